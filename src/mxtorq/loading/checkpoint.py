"""mxtorq's checkpoints back into a module: the inverse of what `pipeline.quantize` wrote.

The module is built without weights, the quantized linears are replaced by `MXFP4Linear` with the
stored codes and transforms, and the other tensors are put in place. What runs is what was written:
no code is re-derived.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxtorq.errors import CheckpointError, MxtorqError
from mxtorq.export.carried import carried_names, stored_transform
from mxtorq.export.checkpoint import Contents, read_checkpoint
from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.loading.families import family_again
from mxtorq.loading.heap import trim
from mxtorq.loading.skeleton import empty_, empty_model, fill_, stored_names
from mxtorq.loading.source import Source, pick_device, place
from mxtorq.models.family import Family
from mxtorq.surgery.linear import MXFP4Linear, keep_weights_, linear_at
from mxtorq.surgery.site_input import SiteInput


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
    source = Source(name=str(path), model=model, tokenizer=tokenizer, family=family, device=device)
    return source, contents.manifest


def build_model(contents: Contents, name: str, family: Family) -> nn.Module:
    """The module that a checkpoint describes, on the CPU, unquantized tensors in BF16."""
    model = empty_model(contents.config, family)
    for index in range(len(list(model.get_submodule(family.layers).children()))):
        restore_layer_(model, contents, name, family, index)
    outside = [n for n in stored_names(model, family) if not n.startswith(f"{family.layers}.")]
    fill_(model, outside, lambda tensor: _read_like(model, contents, tensor, name))
    model.tie_weights()  # type: ignore[operator]
    known = {*stored_names(model, family), *model.state_dict()}
    _require_known(contents, known, name)
    return model


def restored_layers(
    contents: Contents, name: str, family: Family, device: torch.device
) -> Iterator[nn.Module]:
    """Each decoder layer of a checkpoint where it computes, one at a time in memory."""
    model = empty_model(contents.config, family)
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        restore_layer_(model, contents, name, family, index)
        yield place(layer, device)
        empty_(layer)
        trim()


def restore_layer_(
    model: nn.Module, contents: Contents, name: str, family: Family, index: int
) -> None:
    """Fill a decoder layer of an empty model.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or belongs to no part of the layer.
    """
    prefix = f"{family.layers}.{index}."
    restore_sites_(model, contents, name, prefix)
    parameters = [n for n, _ in model.named_parameters() if n.startswith(prefix)]
    fill_(model, parameters, lambda tensor: _read_like(model, contents, tensor, name))


def restore_sites_(model: nn.Module, contents: Contents, name: str, prefix: str = "") -> None:
    """Replace the quantized linears of the sites whose names start with ``prefix``.

    Raises:
        CheckpointError: as `restore_layer_`.
    """
    for entry in contents.manifest.sites:
        if entry.site.startswith(prefix):
            _restore_site_(model, contents, name, entry)


def require_described(
    model: nn.Module, contents: Contents, name: str, parameters: Iterable[str], known: set[str]
) -> None:
    """Refuse a checkpoint that lacks one of a model's parameters, or has more than is ``known``.

    Raises:
        CheckpointError: so it is.
    """
    for parameter in parameters:
        _require_like(model, contents, parameter, name)
    _require_known(contents, known, name)


def _restore_site_(model: nn.Module, contents: Contents, name: str, entry: SiteEntry) -> None:
    for linear in entry.linears:
        _require_width(linear_at(model, linear), entry.width, linear)
    transform = stored_transform(entry, contents.weights, contents.transforms)
    rule = ScaleRule(contents.manifest.scale_rules["activations"])
    experts = entry.experts["count"] if entry.experts else 1
    shared = SiteInput(transform, rule, len(entry.linears) // experts)
    for linear in entry.linears:
        codes = MXFP4(
            *(_read(contents, f"{linear}.weight_{part}", name) for part in ("packed", "scale"))
        )
        replaced = linear_at(model, linear)
        _require_shape(replaced, codes, linear)
        bias = f"{linear}.bias"
        kept = None if replaced.bias is None else _read_like(model, contents, bias, name)
        model.set_submodule(linear, MXFP4Linear(codes, kept, shared))


def _read(contents: Contents, tensor: str, name: str) -> torch.Tensor:
    _require_stored(contents, tensor, name)
    return contents.weights.tensor(tensor)


def _require_stored(contents: Contents, tensor: str, name: str) -> None:
    if tensor not in contents.weights.entries:
        raise CheckpointError(
            asked=f"the tensor {tensor} of the checkpoint {name}",
            found="a checkpoint without it",
            why="config.json and the manifest describe a model that has it",
            todo="quantize again; do not mix files of two checkpoints",
        )


def _read_like(model: nn.Module, contents: Contents, tensor: str, name: str) -> torch.Tensor:
    _require_like(model, contents, tensor, name)
    return contents.weights.tensor(tensor)


def _require_like(model: nn.Module, contents: Contents, tensor: str, name: str) -> None:
    _require_stored(contents, tensor, name)
    expected, found = tuple(model.get_parameter(tensor).shape), contents.weights.entry(tensor)
    if tuple(found.shape) != expected or found.dtype != torch.bfloat16:
        raise CheckpointError(
            asked=f"the tensor {tensor} of the checkpoint {name}, bfloat16 {expected}",
            found=f"{found.dtype} {tuple(found.shape)}",
            why="config.json describes another model",
            todo="quantize again; do not mix files of two checkpoints",
        )


def _require_known(contents: Contents, known: set[str], name: str) -> None:
    matrices = carried_names(contents.manifest.sites)
    unknown = sorted(set(contents.weights.names) - known - matrices)
    if unknown:
        raise CheckpointError(
            asked=f"the checkpoint {name}",
            found=f"tensors that no part of the model has: {', '.join(unknown[:3])}",
            why="config.json, the manifest and the tensors describe different models",
            todo="quantize again; do not mix files of two checkpoints",
        )


def _require_width(linear: nn.Linear, width: int, name: str) -> None:
    if linear.in_features != width:
        raise CheckpointError(
            asked=f"{name} with inputs of {linear.in_features} features",
            found=f"a transform of {width} features in the manifest",
            why="a transform maps all features of a linear's input",
            todo="quantize again; do not mix files of two checkpoints",
        )


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
