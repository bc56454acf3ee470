"""The model that a checkpoint was made from, again, for what only both together can say.

A manifest names its source and does not hash it, and folders are renamed. So an original is known
by what quantizing leaves: the shape of every linear and of the embedding, and the length of every
row of the embedding, which nothing changes but a rotation, and that keeps lengths. Other weights of
the same shape are refused by this, a fine-tuning that left the embedding as it was is not; what it
would be taken for is a checkpoint far from its original.

All of this is looked at on disk. Then the original is loaded beside the checkpoint, which is the
price: memory for a whole unquantized model, in the numbers that the device computes in.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from mxtorq.errors import UsageError
from mxtorq.export.manifest import Manifest
from mxtorq.loading.at_rest import stored_value
from mxtorq.loading.source import Source, load_source
from mxtorq.machine import free_device_memory, free_memory
from mxtorq.models.family import Family
from mxtorq.quantization import Progress
from mxtorq.reports.needs import in_units
from mxtorq.surgery.linear import MXFP4Linear
from mxtorq.surgery.outliers import add_outliers_

LENGTHS = 2.0**-8
"""Up to which a row of a rotated embedding may have another length: rounding its elements to BF16
changes each by 2^-9 at most, and so the row; twice that leaves room for the rotation's own
rounding."""

_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Original:
    """A model that a checkpoint was made from, as it was quantized."""

    source: Source
    weights_sha256: str
    """Of its weights before outliers, as in the rows of `comparison.compare`."""


def load_original(
    name: str,
    checkpoint: Source,
    manifest: Manifest,
    family: Family | None,
    progress: Progress,
) -> Original:
    """The model called ``name``, with the outliers that the checkpoint's source had.

    Args:
        name: a folder, a hub id, or ``reference``.
        checkpoint: what was made from it, in memory.
        manifest: the checkpoint's.
        family: the caller's own, if it was quantized with one.
        progress: told when it is there.

    Raises:
        UsageError: the checkpoint was made from another model, or memory does not hold both.
        MxtorqError: the model cannot be read.
    """
    progress("load the original", 0, 1)
    at_rest = load_source(name, checkpoint.device, at_rest=True, family=family)
    require_source(at_rest, checkpoint, str(manifest.source["model"]))
    require_room(at_rest, checkpoint)
    source = load_source(name, checkpoint.device, family=family)
    digest = source.fingerprint()
    outliers = manifest.source["outliers"]
    if outliers is not None:
        add_outliers_(source.model, source.family, outliers, manifest.seed)
    progress("load the original", 1, 1)
    return Original(source=source, weights_sha256=digest)


def require_source(original: Source, checkpoint: Source, said: str) -> None:
    """Refuse a model that a checkpoint cannot have been made from.

    Args:
        original: the model, at rest or in memory.
        checkpoint: in memory.
        said: what the manifest calls its source.

    Raises:
        UsageError: shapes differ, or the embedding is another one.
    """
    found = _other_shape(original, checkpoint) or _other_embedding(original, checkpoint)
    if found is not None:
        raise UsageError(
            asked=f"how far {checkpoint.name} is from the original {original.name}",
            found=found,
            why="predictions are compared with those of the model that was quantized, and this is "
            "another one",
            todo=f"name the model that it was made from; its manifest says {said!r}",
        )


def require_room(original: Source, checkpoint: Source) -> None:
    """Refuse to load an original that cannot fit beside a checkpoint that is in memory already.

    Raises:
        UsageError: its weights alone are larger than what is free.
    """
    device, numbers = original.device, sum(part.numel() for part in original.model.parameters())
    needed = numbers * original.dtype.itemsize
    free = free_memory() if device.type == "cpu" else free_device_memory(device)
    if needed > free:
        raise UsageError(
            asked=f"{original.name} beside {checkpoint.name} in memory",
            found=f"{in_units(needed)} of weights in {original.dtype}, {in_units(free)} free",
            why="predictions of both are compared token by token, so both are loaded at a time",
            todo="use a machine with more memory, or leave --original away: `mxtorq evaluate` of "
            "each on the same text gives both perplexities one after the other",
        )


def _other_shape(original: Source, checkpoint: Source) -> str | None:
    """The first part that has another shape, if one has."""
    there, here = _shapes(original.model), _shapes(checkpoint.model)
    for name in [*there, *here]:
        if there.get(name) != here.get(name):
            sides = (_sized(original, there.get(name)), _sized(checkpoint, here.get(name)))
            return f"{name}: {', '.join(sides)}"
    return None


def _sized(source: Source, shape: tuple[int, ...] | None) -> str:
    return f"{'none' if shape is None else ' x '.join(map(str, shape))} in {source.name}"


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the matrices that a model has before and after quantizing."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MXFP4Linear):
            rows, bytes_of_row = module.weight_packed.shape
            found[name] = rows, 2 * bytes_of_row
        elif isinstance(module, nn.Linear | nn.Embedding):
            found[name] = tuple(module.weight.shape)
    return found


def _other_embedding(original: Source, checkpoint: Source) -> str | None:
    """How the embedding differs from the original's, if no rotation explains it."""
    name = f"{original.family.embedding}.weight"
    embedding: Any = checkpoint.model.get_submodule(checkpoint.family.embedding)
    there, here = stored_value(original, name), embedding.weight.detach().cpu()
    if torch.equal(there, here.bfloat16()):
        return None
    away = (_lengths(here) - _lengths(there)).abs() / _lengths(there).clamp(min=1e-30)
    row = int(away.argmax())
    if away[row] <= LENGTHS:
        return None
    return (
        f"an embedding with other rows: that of token {row} has {away[row] * 100:.3g} % another "
        "length, which a rotation keeps"
    )


def _lengths(matrix: Tensor) -> Float64[Tensor, " rows"]:
    """Of the rows of a matrix, which may be too large for float64 as a whole."""
    parts = matrix.split(_ROWS)
    return torch.cat([part.double().square().sum(-1).sqrt() for part in parts])
