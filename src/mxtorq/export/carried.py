"""Transforms that compressed-tensors' ``transform_config`` carries, so that stock engines run them.

One group a site, of type ``random-hadamard``, which says that the stored matrix is to be divided by
the root of its size, and nothing about what the matrix is (``random-matrix`` is divided by vLLM and
not by the library). The matrix stands beside the first linear of the site, and all linears of the
site are targets. Checked with compressed-tensors 0.20 and vLLM 0.32.

transformers drops such a configuration in silence. So the tensors of a checkpoint with one stand
under a file name that transformers does not look for, while vLLM reads every safetensors file.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mxtorq.errors import CheckpointError, FormatError
from mxtorq.export.manifest import SiteEntry
from mxtorq.formats.spec import BLOCK
from mxtorq.reading.shards import Shards
from mxtorq.transforms import KINDS
from mxtorq.transforms.base import Transform
from mxtorq.transforms.engine_matrix import EngineMatrix

_LOCATION = "input"
_PREFIX = "mxtorq_"

STORED_NAME = re.compile(rf"\.{_PREFIX}\w+_{_LOCATION}\.weight$")
"""What the names of the stored matrices end in."""


def is_carried(entry: SiteEntry) -> bool:
    """Whether a site's transform is one that ``transform_config`` carries."""
    return entry.kind == EngineMatrix.kind


def matrix_name(entry: SiteEntry) -> str:
    """The tensor with a site's matrix: LINEAR.GROUP_LOCATION.weight."""
    return f"{entry.linears[0]}.{_group(entry)}_{_LOCATION}.weight"


def carried_names(entries: Iterable[SiteEntry]) -> set[str]:
    """The tensors among a model's that are matrices of its sites."""
    return {matrix_name(entry) for entry in entries if is_carried(entry)}


def carried_matrices(
    entries: Iterable[SiteEntry], transforms: Mapping[str, Transform]
) -> dict[str, Tensor]:
    """The matrices of the sites that have one, under the names that engines look for."""
    return {
        matrix_name(entry): transforms[entry.site].tensors()["matrix"]
        for entry in entries
        if is_carried(entry)
    }


def transform_config(entries: Iterable[SiteEntry]) -> dict[str, Any]:
    """The ``transform_config`` of some sites; empty where none needs one."""
    groups = {_group(entry): _scheme(entry) for entry in entries if is_carried(entry)}
    return {"config_groups": groups} if groups else {}


def stored_transform(entry: SiteEntry, weights: Shards, transforms: Shards | None) -> Transform:
    """The transform of a site out of a checkpoint's tensors.

    Args:
        entry: the site.
        weights: the model's tensors, where a carried matrix is.
        transforms: those of all other transforms.

    Raises:
        CheckpointError: its tensors are not there, or do not describe one of its kind.
    """
    if is_carried(entry):
        return carried_transform(entry, weights)
    return own_transform(entry, transforms)


def carried_transform(entry: SiteEntry, weights: Shards) -> Transform:
    """The transform of a site whose matrix is among the model's tensors. Raises as above."""
    name = matrix_name(entry)
    return _made(entry, {"matrix": weights.tensor(name)} if name in weights.entries else {})


def own_transform(entry: SiteEntry, transforms: Shards | None) -> Transform:
    """The transform of any other site. Raises as above."""
    return _made(entry, {} if transforms is None else transforms.below(entry.site))


def _made(entry: SiteEntry, parts: Mapping[str, Tensor]) -> Transform:
    try:
        return KINDS[entry.kind].from_tensors(entry.width, parts)
    except (KeyError, FormatError) as error:
        raise CheckpointError(
            asked=f"the transform of {entry.site}",
            found=f"kind {entry.kind!r} with the tensors {sorted(parts)}: {error}",
            why=f"it is none of {', '.join(KINDS)}, or not whole",
            todo="load it with the release that wrote it, or quantize again",
        ) from error


def _group(entry: SiteEntry) -> str:
    """A group's name becomes that of a module, which has no dots."""
    return _PREFIX + entry.site.replace(".", "_")


def _scheme(entry: SiteEntry) -> dict[str, Any]:
    # Engines may put a prefix before names.
    targets = [rf"re:(.*\.)?{re.escape(linear)}$" for linear in entry.linears]
    return {
        "type": "random-hadamard",
        "head_dim": BLOCK,
        "precision": "torch.bfloat16",
        "randomize": False,
        "requires_grad": False,
        "apply": [{"targets": targets, "location": _LOCATION, "inverse": False, "ignore": []}],
    }
