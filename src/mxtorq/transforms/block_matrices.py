"""A matrix of its own for every block of channels: T = diag(T_1, ..., T_B), orthogonal or not.

What WUSH and HiRes fit, and DuQuant++'s ablation with one rotation a block. It needs B n^2 stored
numbers where a shared matrix needs n^2.
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
from mxtorq.transforms.base import Transform


@dataclass(frozen=True, eq=False)
class BlockMatrices(Transform):
    """x' of block b is x of block b times ``matrices[b]``."""

    kind: ClassVar[str] = "block-matrices"
    matrices: Float64[Tensor, "blocks n n"]

    def __post_init__(self) -> None:
        singular = torch.linalg.svdvals(self.matrices)
        worst = (singular[:, -1] / singular[:, 0]).min().item()
        if not worst > 1e-10:  # also NaN
            raise FormatError(
                asked=f"a {self.kind} transform",
                found=f"a block whose smallest singular value is {worst:.1e} of its largest",
                why="weights take the inverse, which that block does not have in float64",
                todo="damp the statistics that it was fitted to",
            )

    @property
    def width(self) -> int:
        blocks, size, _ = self.matrices.shape
        return blocks * size

    def apply(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        blocks, size, _ = self.matrices.shape
        if size == BLOCK:
            return rotate(values, self.matrices)
        rows = values.reshape(-1, blocks, size).transpose(0, 1)
        return torch.bmm(rows, self.matrices.to(values.dtype)).transpose(0, 1).reshape(values.shape)

    def split_blocks(self) -> tuple[Transform | None, Float64[Tensor, "m 32 32"] | None]:
        return (None, self.matrices) if self.matrices.shape[1] == BLOCK else (self, None)

    def fuse(self, weight: Float64[Tensor, "d_out d"]) -> Float64[Tensor, "d_out d"]:
        blocks, size, _ = self.matrices.shape
        # W' = W T^-T, block by block: T W'^T = W^T.
        columns = weight.T.reshape(blocks, size, -1)
        solved: Tensor = torch.linalg.solve(self.matrices, columns)
        return solved.reshape(self.width, -1).T

    @property
    def multiply_adds(self) -> int:
        return self.width * self.matrices.shape[-1]

    def tensors(self) -> dict[str, Tensor]:
        return {"matrices": self.matrices}

    @classmethod
    def from_tensors(cls, width: int, tensors: Mapping[str, Tensor]) -> "BlockMatrices":
        return cls(tensors["matrices"])
