"""Identity, and one n x n rotation shared by all blocks of the feature axis.

`BlockRotation` is I (x) R: what block-Hadamard and DuQuant++ apply. It stays inside an MX block
when n = 32, so an outlier never leaves the block whose scale it sets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.errors import FormatError
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import rotate
from mxtorq.transforms.base import Rotation, SiteStatistics, Transform, TransformMethod


@dataclass(frozen=True, eq=False)
class Identity(Rotation):
    """T = I: direct quantization."""

    kind: ClassVar[str] = "identity"
    features: int

    @property
    def width(self) -> int:
        return self.features

    def apply(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        return values

    def split_blocks(self) -> tuple[None, None]:
        return None, None

    @property
    def multiply_adds(self) -> int:
        return 0

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_tensors(cls, width: int, tensors: Mapping[str, Tensor]) -> "Identity":
        return cls(width)


@dataclass(frozen=True, kw_only=True)
class IdentityMethod(TransformMethod):
    """Direct RTN: round what is there. The row that every method must beat."""

    needs_hessian: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False

    def fit(self, statistics: SiteStatistics, seed: int) -> Identity:
        return Identity(statistics.width)


@dataclass(frozen=True, eq=False)
class BlockRotation(Rotation):
    """T = I (x) R, one orthogonal R [n, n] for every block of n features."""

    kind: ClassVar[str] = "block-rotation"
    features: int
    rotation: Float64[Tensor, "n n"]

    def __post_init__(self) -> None:
        require_orthogonal(self.rotation, self.kind)
        if self.features % len(self.rotation):
            raise FormatError(
                asked=f"a {self.kind} of {self.features} features",
                found=f"a matrix of size {len(self.rotation)}",
                why="the features do not divide into blocks of that size",
                todo="choose a block size that divides the width",
            )

    @property
    def width(self) -> int:
        return self.features

    def apply(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        if len(self.rotation) == BLOCK:
            return rotate(values, self.rotation[None])
        blocks = values.unflatten(-1, (-1, len(self.rotation)))
        rotated: Tensor = blocks @ self.rotation.to(values.dtype)
        return rotated.flatten(-2)

    def split_blocks(self) -> tuple[Transform | None, Float64[Tensor, "m 32 32"] | None]:
        return (None, self.rotation[None]) if len(self.rotation) == BLOCK else (self, None)

    @property
    def multiply_adds(self) -> int:
        return self.features * len(self.rotation)

    def tensors(self) -> dict[str, Tensor]:
        return {"rotation": self.rotation}

    @classmethod
    def from_tensors(cls, width: int, tensors: Mapping[str, Tensor]) -> "BlockRotation":
        return cls(width, tensors["rotation"])


def require_orthogonal(matrix: Tensor, what: str) -> None:
    """Refuse a matrix that is not float64, square and orthogonal to 1e-12 a row and column.

    Raises:
        FormatError: with the largest entry of R^T R - I.
    """
    square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1]
    if square and matrix.dtype == torch.float64:
        identity = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
        worst = (matrix.T @ matrix - identity).abs().max().item()
        if worst <= 1e-12:
            return
        found = f"R^T R differs from I by {worst:.1e}"
    else:
        found = f"shape {tuple(matrix.shape)}, dtype {matrix.dtype}"
    raise FormatError(
        asked=f"the rotation of a {what}",
        found=found,
        why="weights are rotated by R in place of its inverse transpose, which only an orthogonal "
        "float64 matrix allows",
        todo="pass an orthogonal matrix, or use a transform that is not a rotation",
    )
