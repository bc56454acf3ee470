"""Qwen3, dense: Llama's plan with RMSNorms on queries and keys, and heads of any width.

The extra norms (``q_norm``, ``k_norm``) sit behind the projections and are no site's source.
"""

from mxtorq.models.family import GATED_DECODER_SITES, GATED_DECODER_WRITERS, Family

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layers="model.layers",
    embedding="model.embed_tokens",
    rotary="model.rotary_emb",
    final_norm="model.norm",
    head="lm_head",
    sites=GATED_DECODER_SITES,
    residual_writers=GATED_DECODER_WRITERS,
)
