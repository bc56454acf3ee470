"""Transforms and rotations under the names that files and other processes know them by."""

from collections.abc import Mapping

from torch import Tensor

from mxtorq.transforms.base import OfflineRotations, Rotation, Transform


def transform_tensors(transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
    """The tensors of some transforms: ``SITE.PART``."""
    return {
        f"{name}.{part}": tensor
        for name, transform in transforms.items()
        for part, tensor in transform.tensors().items()
    }


def named_rotations(rotations: OfflineRotations) -> dict[str, Rotation]:
    """The rotations of a whole model: ``residual``, ``head.0``, ..."""
    named = {f"head.{number}": each for number, each in enumerate(rotations.heads)}
    return named if rotations.residual is None else {"residual": rotations.residual, **named}


def rotations_named(transforms: Mapping[str, Transform]) -> OfflineRotations:
    """The inverse of `named_rotations`."""
    rotations = {name: each for name, each in transforms.items() if isinstance(each, Rotation)}
    residual = rotations.pop("residual", None)
    return OfflineRotations(residual, tuple(rotations[f"head.{n}"] for n in range(len(rotations))))
