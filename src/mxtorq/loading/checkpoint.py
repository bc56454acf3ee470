"""mxtorq's checkpoints back into a module: the inverse of what `pipeline.quantize` wrote.

The module is built without weights, the quantized linears are replaced by `MXFP4Linear` with the
stored codes and transforms, and the other tensors are put in place. What runs is what was written:
no code is re-derived.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxtorq.errors import CheckpointError, FormatError, MxtorqError
from mxtorq.export.checkpoint import Contents, read_checkpoint
from mxtorq.export.manifest import Manifest
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.loading.families import family_again
from mxtorq.loading.source import Source, pick_device, place
from mxtorq.models.family import Family
from mxtorq.surgery.experts import unpack_experts_
from mxtorq.surgery.linear import MXFP4Linear, keep_weights_, linear_at
from mxtorq.surgery.site_input import SiteInput
from mxtorq.transforms import KINDS
from mxtorq.transforms.base import Transform


def load(
    path: str | Path,
    device: str = "auto",
    *,
    keep_weights: bool = False,
    family: Family | None = None,
) -> nn.Module:
    """Read an mxtorq checkpoint as a transformers model that runs W4A4, on any device.

    Args:
        path: the folder that ``mxtorq quantize`` wrote.
        device: ``auto``, ``cpu``, ``cuda``, ...
        keep_weights: keep dequantized weights after their first use, while half of the memory that
            is free now lasts (`surgery.linear.keep_weights_`): for generating on a CPU.
        family: the family of your own that it was quantized with, if it was.

    Raises:
        CheckpointError: the folder is no checkpoint of ours, is damaged, or is of another version;
            or it needs a family that was not passed.
    """
    model = load_checkpoint(path, pick_device(device), family)[0].model
    if keep_weights:
        keep_weights_(model)
    return model


def load_checkpoint(
    path: str | Path, device: torch.device, own: Family | None = None
) -> tuple[Source, Manifest]:
    """As `load`, with tokenizer, family and manifest."""
    from transformers import AutoTokenizer, GenerationConfig

    contents = read_checkpoint(Path(path))
    family = family_again(contents.config, str(contents.manifest.source.get("family")), own)
    try:
        model: Any = place(build_model(contents, str(path), family), device)
        model.generation_config = GenerationConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        family = family.bound(model.config)
    except MxtorqError:
        raise
    except Exception as error:  # torch, transformers and tokenizers share no root
        raise CheckpointError(
            asked=f"the checkpoint {path}",
            found=f"{type(error).__name__}: {str(error)[:500]}",
            why="its files are whole but do not describe a model that can be built",
            todo="load it with the release that wrote it, or quantize again",
        ) from error
    source = Source(name=str(path), model=model, tokenizer=tokenizer, family=family)
    return source, contents.manifest


def build_model(contents: Contents, name: str, family: Family) -> nn.Module:
    """The module that a checkpoint describes, on the CPU, unquantized tensors in BF16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {k: v for k, v in contents.config.items() if k not in ("quantization_config", "dtype")}
    config = AutoConfig.for_model(plain.pop("model_type"), **plain)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    unpack_experts_(model, family.bound(config))
    # Its buffers are computed, not stored, so they are made again outside of `meta`.
    rotary: Any = type(model.get_submodule(family.rotary))
    model.set_submodule(family.rotary, rotary(config=config))

    tensors = dict(contents.tensors)
    for entry in contents.manifest.sites:
        transform = _transform(entry.kind, entry.width, contents.transforms, entry.site)
        rule = ScaleRule(contents.manifest.scale_rules["activations"])
        experts = entry.experts["count"] if entry.experts else 1
        shared = SiteInput(transform, rule, len(entry.linears) // experts)
        for linear in entry.linears:
            codes = MXFP4(
                _take(tensors, f"{linear}.weight_packed"), _take(tensors, f"{linear}.weight_scale")
            )
            replaced = linear_at(model, linear)
            _require_shape(replaced, codes, linear)
            bias = None if replaced.bias is None else _take(tensors, f"{linear}.bias")
            model.set_submodule(linear, MXFP4Linear(codes, bias, shared))
    outcome = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    still_empty = [key for key, value in model.state_dict().items() if value.is_meta]
    if still_empty or outcome.unexpected_keys:
        raise CheckpointError(
            asked=f"the checkpoint {name}",
            found=f"missing tensors: {still_empty[:3]}, unknown: {outcome.unexpected_keys[:3]}",
            why="config.json, the manifest and the tensors describe different models",
            todo="quantize again; do not mix files of two checkpoints",
        )
    return model.eval().requires_grad_(False)


def _take(tensors: dict[str, Any], key: str) -> torch.Tensor:
    if key not in tensors:
        raise CheckpointError(
            asked=f"the tensor {key}",
            found="a checkpoint without it",
            why="the manifest lists its linear as quantized",
            todo="quantize again; do not mix files of two checkpoints",
        )
    tensor: torch.Tensor = tensors.pop(key)
    return tensor


def _require_shape(linear: nn.Linear, codes: MXFP4, name: str) -> None:
    rows, width = linear.out_features, linear.in_features
    expected = (rows, width // 2), (rows, width // 32)
    found = tuple(codes.packed.shape), tuple(codes.e8m0.shape)
    if found != expected or {codes.packed.dtype, codes.e8m0.dtype} != {torch.uint8}:
        raise CheckpointError(
            asked=f"{name} with {rows} x {width} weights",
            found=f"weight_packed {found[0]} and weight_scale {found[1]}, {codes.packed.dtype}",
            why="MXFP4 keeps two codes a byte and one scale byte for 32 weights",
            todo="quantize again; do not mix files of two checkpoints",
        )


def _transform(kind: str, width: int, tensors: dict[str, torch.Tensor], site: str) -> Transform:
    prefix = f"{site}."
    parts = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        return KINDS[kind].from_tensors(width, parts)
    except (KeyError, FormatError) as error:
        raise CheckpointError(
            asked=f"the transform of {site}",
            found=f"kind {kind!r} with the tensors {sorted(parts)}: {error}",
            why=f"it is none of {', '.join(KINDS)}, or not whole",
            todo="load it with the release that wrote it, or quantize again",
        ) from error
