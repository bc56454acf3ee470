"""Which models llama.cpp computes as transformers does, and what a GGUF file says of them.

A table of architectures and the metadata of each: sizes, positions, experts. What llama.cpp would
compute otherwise is refused, with the line of config.json that says so: its loader takes a file
with a missing key without a word and falls back to a default of its own.

Positions: ``rope_parameters`` (transformers 5) or ``rope_scaling`` (4). Linear and YaRN scaling
have keys; Llama 3.1's has none and becomes a tensor of factors that frequencies are divided by.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from mxtorq.errors import UsageError
from mxtorq.export.packed import Packed
from mxtorq.reading.documents import conforms


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What llama.cpp calls an architecture and what it can take of it."""

    architecture: str
    biases: tuple[str, ...] | None
    """The linears that may have one; None for all."""
    interleaved: bool = False
    """Whether it rotates neighbours, so that rows of q and k move."""
    experts: bool = False


_QKV = ("q_proj", "k_proj", "v_proj")

PLANS = {
    "llama": Plan(architecture="LLAMA", interleaved=True, biases=None),
    "mistral": Plan(architecture="LLAMA", interleaved=True, biases=None),
    "qwen2": Plan(architecture="QWEN2", biases=_QKV),
    "qwen3": Plan(architecture="QWEN3", biases=_QKV),
    "qwen3_moe": Plan(architecture="QWEN3MOE", biases=_QKV, experts=True),
}
"""By ``model_type``."""


def plan_of(model: Packed) -> Plan:
    """The plan of a model.

    Raises:
        UsageError: llama.cpp would compute something else.
    """
    config = model.config
    plan = PLANS.get(str(config.get("model_type")))
    wrong = None
    if plan is None:
        wrong = f"model_type = {config.get('model_type')!r}, none of {', '.join(PLANS)}"
    elif config.get("hidden_act", "silu") != "silu":
        wrong = f"hidden_act = {config['hidden_act']!r}; llama.cpp computes SiLU there"
    elif config.get("partial_rotary_factor") not in (None, 1.0):
        wrong = "positions that rotate a part of a head only"
    elif _slides(config):
        wrong = "a sliding attention window, which llama.cpp does not have for this architecture"
    elif plan.experts and not config.get("norm_topk_prob"):
        wrong = "norm_topk_prob = false; llama.cpp normalizes the weights of experts"
    elif plan.experts and (
        config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    ):
        wrong = "layers without experts beside layers with them"
    else:
        allowed = plan.biases
        biases = [n.split(".")[-2] for n in model.plain if n.endswith(".bias")]
        extra = sorted({n for n in biases if allowed is not None and n not in allowed})
        wrong = f"biases of {', '.join(extra)}, which llama.cpp leaves out" if extra else None
    if plan is None or wrong:
        raise inexpressible(model, str(wrong))
    return plan


def _slides(config: dict[str, Any]) -> bool:
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return window is not None or bool(set(config.get("layer_types") or ()) - {"full_attention"})


def inexpressible(model: Packed, found: str) -> UsageError:
    """The error for what GGUF or llama.cpp cannot say."""
    return UsageError(
        asked=f"{model.folder} in a GGUF file",
        found=found,
        why="llama.cpp would compute another function",
        todo="export to another format, or change the model's configuration where that keeps its "
        "function",
    )


def describe(writer: Any, model: Packed, size: int, notes: list[str], gguf: Any) -> None:
    """Give a `gguf.GGUFWriter` the metadata of a model; ``size``: rows of its embedding.

    Raises:
        UsageError: its positions are rescaled in a way that GGUF has no keys for.
    """
    manifest = model.manifest
    writer.add_type("model")
    name = model.folder.name if manifest is None else str(manifest.source["model"])
    writer.add_name(Path(name).name)
    writer.add_description(" ".join(notes))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)  # GGUF's one name for MXFP4 files
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    heads = size_of(model, "num_attention_heads")
    width = head_width(model)
    writer.add_vocab_size(size)
    writer.add_context_length(size_of(model, "max_position_embeddings"))
    writer.add_embedding_length(size_of(model, "hidden_size"))
    writer.add_block_count(size_of(model, "num_hidden_layers"))
    writer.add_feed_forward_length(size_of(model, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(size_of(model, "num_key_value_heads", "num_attention_heads"))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(_number(model, model.config, "rms_norm_eps"))
    if plan_of(model).experts:
        writer.add_expert_count(size_of(model, "num_experts", "num_local_experts"))
        writer.add_expert_used_count(size_of(model, "num_experts_per_tok"))
        writer.add_expert_feed_forward_length(size_of(model, "moe_intermediate_size"))
    _add_positions(writer, model, gguf)


def size_of(model: Packed, *names: str) -> int:
    """A size of a model by the first of some names in its config.json.

    Raises:
        UsageError: there is none.
    """
    for name in names:
        value = model.config.get(name)
        if value is not None and conforms(value, int) and value > 0:
            return int(value)
    raise inexpressible(model, f"a config.json without {names[0]}, or with no size there")


def head_width(model: Packed) -> int:
    """The features of an attention head. Raises as `size_of`."""
    if model.config.get("head_dim") is not None:
        return size_of(model, "head_dim")
    return size_of(model, "hidden_size") // size_of(model, "num_attention_heads")


def _number(model: Packed, values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    if not conforms(value, float):
        raise inexpressible(model, f"{name} = {value!r:.100}")
    return float(value)  # type: ignore[arg-type]


def _positions(model: Packed) -> dict[str, Any]:
    """The rotary embedding's parameters, where transformers 4 and 5 write them."""
    config = model.config
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise inexpressible(model, f"positions rescaled by {found!r:.300}")
    kind = found.get("rope_type") or found.get("type") or "default"
    theta = found.get("rope_theta") or config.get("rope_theta") or 10_000.0
    theta = _number(model, {"rope_theta": theta}, "rope_theta")
    return {**found, "rope_type": kind, "rope_theta": theta}


def _add_positions(writer: Any, model: Packed, gguf: Any) -> None:
    found = _positions(model)
    writer.add_rope_freq_base(found["rope_theta"])
    kind = found["rope_type"]
    if kind in ("default", "llama3"):
        return
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    extra = {key for key, value in found.items() if value is not None} - known
    if kind not in ("linear", "yarn") or extra:
        raise inexpressible(model, f"positions rescaled by {found!r:.300}")
    writer.add_rope_scaling_type(getattr(gguf.RopeScalingType, kind.upper()))
    writer.add_rope_scaling_factor(_number(model, found, "factor"))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(_original_length(model, found))


def _original_length(model: Packed, found: dict[str, Any]) -> int:
    """Positions before they were rescaled."""
    value = found.get("original_max_position_embeddings")
    return value if conforms(value, int) and value else size_of(model, "max_position_embeddings")


def llama3_factors(model: Packed) -> Float32[np.ndarray, " factors"] | None:
    """What Llama 3.1's rule divides each frequency by, which GGUF keeps as a tensor; or None."""
    found = _positions(model)
    if found["rope_type"] != "llama3":
        return None
    width = head_width(model)
    original = _original_length(model, found)
    low, high, factor = (
        _number(model, found, name) for name in ("low_freq_factor", "high_freq_factor", "factor")
    )
    factors = []
    for index in range(0, width, 2):
        turns = original / (2 * math.pi * found["rope_theta"] ** (index / width))
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - kept) / factor + kept))
    return np.array(factors, dtype=np.float32)
