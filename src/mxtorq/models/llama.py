"""Llama 2, 3, 3.1 and 3.2: RMSNorm, grouped-query attention, gated SiLU MLP."""

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
