"""Qwen3 with experts (30B-A3B, 235B-A22B): Qwen3's attention, and many small MLPs beside a router.

A layer's router sends each token to a few experts. It stays in BF16, and it reads the same norm as
they do. Two inputs of a layer are quantized for all experts alike, each with one transform: what
reaches the MLP, and what reaches the experts' down_proj. ``{}`` in a name stands for an expert's
number; how many there are is in the model's configuration. Models in which some layers have a
plain MLP are refused (`surgery.experts`).
"""

from mxtorq.models.family import GATED_DECODER_SITES, Experts, Family, Site, SiteName

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layers="model.layers",
    embedding="model.embed_tokens",
    rotary="model.rotary_emb",
    final_norm="model.norm",
    head="lm_head",
    sites=(
        *GATED_DECODER_SITES[:2],
        Site(
            name=SiteName.GATE_UP_IN,
            linears=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
            source="post_attention_layernorm",
            reads_residual=True,
            kept_readers=("mlp.gate",),
            tap="mlp.experts",
        ),
        Site(
            name=SiteName.DOWN_IN,
            linears=("mlp.experts.{}.down_proj",),
            source="mlp.experts.{}.up_proj",
        ),
    ),
    residual_writers=("self_attn.o_proj", "mlp.experts.{}.down_proj"),
    experts=Experts(module="mlp.experts", count="num_experts", per_token="num_experts_per_tok"),
)
