"""A model's config.json: read within limits, and nothing in it may make code run.

transformers turns any number in it into modules and tensors, so two things are checked before it
sees the file. Code: ``auto_map`` names Python files of the model's author, and an attention
implementation of the form ``organisation/name`` is a kernel from the hub; both are refused, since
``trust_remote_code`` is off here and there is no way to switch it on. Sizes: what the file promises
must lie in the tensors beside it (`require_plausible`), or a thousand bytes of JSON could ask for
all of a machine's memory.

What it is not: a check that the model is right. Names and shapes are compared when the weights are
put in place.
"""

from pathlib import Path
from typing import Any

from mxtorq.reading.documents import Refusal, conforms, parse_object, read_text

LONGEST = 10 * 2**20
"""Bytes of a config.json."""

_SIZES = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "head_dim"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
_EXPERTS = ("num_experts", "num_local_experts")  # none is a number here
_HINTS: dict[str, Any] = {
    "architectures": list[str] | None,
    "layer_types": list[str] | None,
    "quantization_config": dict[str, Any] | None,
    "text_config": dict[str, Any] | None,
}
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_LONGEST_NAME = 100
_MOST_LAYERS = 10_000
"""transformers makes a list of as many names when it reads the number, before any weights are."""


def read_configuration(path: Path, refuse: Refusal) -> dict[str, Any]:
    """The content of a config.json of some ``model_type`` that brings no code.

    Raises:
        MxtorqError: it is none, or asks for code to be run.
    """
    config = parse_object(read_text(path, LONGEST, refuse), refuse)
    _require_no_code(config, refuse)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not 0 < len(kind) <= _LONGEST_NAME:
        raise refuse(
            f"{path.name} with model_type = {kind!r:.200}",
            "model_type says which architecture the weights are for",
        )
    for part in (config, config.get("text_config")):
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise refuse(f"num_hidden_layers = {layers!r:.50}", "no model has as many layers")
        for key, value in part.items() if isinstance(part, dict) else ():
            if key in _HINTS and not conforms(value, _HINTS[key]):
                raise refuse(f"{key} = {value!r:.200}", f"{key} is of type {_HINTS[key]}")
    return config


def require_plausible(
    config: dict[str, Any], tensors: int, total_bytes: int, refuse: Refusal
) -> None:
    """Refuse sizes that the tensors at hand cannot fill, before anything is built of those sizes.

    A weight has at least half a byte, every layer at least one tensor. What passes needs no more
    memory than some times the bytes of its files.

    Args:
        tensors: how many there are.
        total_bytes: what they occupy.

    Raises:
        MxtorqError: so it is.
    """
    for part in (config, config.get("text_config") or {}):
        for key in (*_SIZES, *_EXPERTS):
            size = part.get(key)
            if size is not None and not (conforms(size, int) and size >= (key in _SIZES)):
                raise refuse(f"{key} = {size!r:.200}", "sizes are positive integers")
        layers = part.get("num_hidden_layers") or 1
        hidden = part.get("hidden_size") or 1
        inner = part.get("moe_intermediate_size") or part.get("intermediate_size") or 1
        experts = part.get("num_experts") or part.get("num_local_experts") or 1
        heads = max(part.get("num_attention_heads") or 1, part.get("num_key_value_heads") or 1)
        if layers > tensors:
            raise refuse(
                f"num_hidden_layers = {layers:.3e} and {tensors} tensors",
                "a layer has at least one tensor",
            )
        for what, weights in (
            ("the embedding", (part.get("vocab_size") or 1) * hidden),
            ("the MLPs", layers * hidden * inner),
            ("the experts of a layer", experts * hidden * inner),
            ("the attention", layers * hidden * max(heads * (part.get("head_dim") or 1), 1)),
        ):
            if weights > 2 * total_bytes:
                raise refuse(
                    f"{what}: {weights:.3e} weights by config.json, {total_bytes} bytes of tensors",
                    "a weight takes half a byte at least, so they are not of one model, or a "
                    "download is not complete",
                )


def _require_no_code(config: dict[str, Any], refuse: Refusal) -> None:
    waiting: list[Any] = [config]
    while waiting:  # no recursion: nesting is somebody else's choice
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        if not isinstance(value, dict):
            continue
        waiting.extend(value.values())
        if value.get("auto_map"):
            raise refuse(
                f"auto_map = {value['auto_map']!r:.200}",
                "the model asks for Python code of its author to be run, which is never done here "
                "(trust_remote_code is off). If the class that transformers has for this "
                "model_type computes the same, remove auto_map from a copy of config.json",
            )
        for key in _KERNELS:
            if "/" in str(value.get(key)):
                raise refuse(
                    f"{key} = {value[key]!r:.200}",
                    "it names code on the hub, which is never run here. Remove the line from a "
                    "copy of config.json",
                )
