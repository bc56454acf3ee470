"""A tiny random model of each family, with everything that makes surgery hard.

Grouped-query attention, heads whose total is not the hidden size (Mistral, Qwen3), biases
everywhere (Llama) or on q, k and v (Qwen2), norm gains that are not one, a tied head in two of
them, experts (Qwen3-MoE). `LLAMA_32` turns the tiny Llama into one with a tied head and rescaled
positions.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from mxtorq.models import FAMILIES as UNBOUND
from mxtorq.surgery.experts import unpack_experts_

_SHARED: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
}

CONFIGS = {
    "llama": LlamaConfig(**_SHARED, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "mistral": MistralConfig(**_SHARED, head_dim=32, sliding_window=None),
    # As in Qwen2.5's files: a window that is not used.
    "qwen2": Qwen2Config(
        **_SHARED, tie_word_embeddings=True, use_sliding_window=False, sliding_window=128
    ),
    "qwen3": Qwen3Config(**_SHARED, head_dim=32, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(
        **{**_SHARED, "intermediate_size": 160},  # of plain MLPs, of which there are none
        moe_intermediate_size=96,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        head_dim=32,
    ),
}

HEAD_DIM = {
    name: getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, config in CONFIGS.items()
}

FAMILIES = {name: UNBOUND[name].bound(config) for name, config in CONFIGS.items()}
"""The families of these models, with the numbers of their experts."""

LLAMA_32: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
"""What Llama 3.2 has and the tiny Llama has not."""


def build(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random model in float32 with weights, gains and biases of a realistic spread."""
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    unpack_experts_(model, FAMILIES[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=0.15)
    return model.eval().requires_grad_(False)


def build_fp64(family: str, **changes: Any) -> torch.nn.Module:
    """A tiny model that computes in float64 throughout.

    transformers' RMSNorm and routers go through float32 whatever the model's dtype is, which would
    hide (or blow up) differences of float64 size.
    """
    model = build(family, **changes).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)  # type: ignore[method-assign]
        elif type(module).__name__.endswith("TopKRouter"):
            module.forward = partial(_route, module)  # type: ignore[method-assign]
    return model


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return (
        module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    )


def _route(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.nn.functional.linear(x, module.weight)
    values, indices = logits.softmax(-1).topk(module.top_k, dim=-1)
    assert module.norm_topk_prob
    return logits, values / values.sum(-1, keepdim=True), indices


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**{letter: i for i, letter in enumerate(alphabet)}, "<s>": 256}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")


def save(model: torch.nn.Module, folder: Path) -> Path:
    """Write a model in BF16 and its tokenizer as a Hugging Face folder."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokens(count: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [count, length]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, length), generator=draw)
