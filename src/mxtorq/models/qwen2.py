"""Qwen2 and Qwen2.5, dense: Llama's plan with biases on q, k and v.

The biases belong to the outputs: they stay as they are in BF16, and only what changes the values
themselves (a smoothing of o_in, rotated heads) changes v_proj's too.
"""

from mxtorq.models.family import GATED_DECODER_SITES, GATED_DECODER_WRITERS, Family

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layers="model.layers",
    embedding="model.embed_tokens",
    rotary="model.rotary_emb",
    final_norm="model.norm",
    head="lm_head",
    sites=GATED_DECODER_SITES,
    residual_writers=GATED_DECODER_WRITERS,
)
