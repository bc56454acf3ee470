"""Mistral 7B (v0.2 and later), Nemo and others of that plan: Llama's with heads of any width.

Models that slide an attention window over the text (Mistral-7B-v0.1) are refused when they are read
(`loading.source`).
"""

from mxtorq.models.family import GATED_DECODER_SITES, GATED_DECODER_WRITERS, Family

MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    layers="model.layers",
    embedding="model.embed_tokens",
    rotary="model.rotary_emb",
    final_norm="model.norm",
    head="lm_head",
    sites=GATED_DECODER_SITES,
    residual_writers=GATED_DECODER_WRITERS,
)
