"""Llama 2, 3, 3.1 and 3.2: RMSNorm, grouped-query attention, gated SiLU MLP.

The head may be tied to the embedding (3.2), and positions may be rescaled (``rope_scaling``, since
3.1): both are read from the model, and nothing here depends on them.
"""

from mxtorq.models.family import GATED_DECODER_SITES, GATED_DECODER_WRITERS, Family

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    layers="model.layers",
    embedding="model.embed_tokens",
    rotary="model.rotary_emb",
    final_norm="model.norm",
    head="lm_head",
    sites=GATED_DECODER_SITES,
    residual_writers=GATED_DECODER_WRITERS,
)
