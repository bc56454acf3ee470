"""One 32 x 32 matrix for all blocks, as an engine applies it that keeps it in BF16.

vLLM loads a matrix of compressed-tensors' ``transform_config`` in the model's dtype, divides it by
the root of its size in place, multiplies, and rounds the product to BF16. So what it applies is not
the R that was stored times that root but

    M = bf16(bf16(R sqrt(n)) / sqrt(n))

which is orthogonal to about 2^-8. Weights take the inverse of M, in float64, and nothing is lost
but the rounding of x M itself. `online` does it, so that evaluation sees what the engine will see.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.errors import FormatError
from mxtorq.transforms.base import Transform


@dataclass(frozen=True, eq=False)
class EngineMatrix(Transform):
    """x' = x M in every block; M holds BF16 values."""

    kind: ClassVar[str] = "engine-matrix"
    features: int
    block: Float64[Tensor, "n n"]

    def __post_init__(self) -> None:
        exact = torch.equal(self.block, self.block.bfloat16().double())
        singular = torch.linalg.svdvals(self.block)
        if not exact or self.features % len(self.block) or not singular[-1] > 0.5 * singular[0]:
            raise FormatError(
                asked=f"a {self.kind} of {self.features} features",
                found=f"a matrix {tuple(self.block.shape)} with singular values from "
                f"{singular[-1]:.2e} to {singular[0]:.2e}",
                why="it holds BF16 values, divides the features and is a rotation but for rounding",
                todo="make it of an orthogonal matrix with `engine_matrix`",
            )

    @property
    def width(self) -> int:
        return self.features

    def apply(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        blocks = values.unflatten(-1, (-1, len(self.block)))
        turned: Tensor = blocks @ self.block.to(values.device, values.dtype)
        return turned.flatten(-2)

    def online(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        """bf16(x M)."""
        return self.apply(values).bfloat16().to(values.dtype)

    def fuse(self, weight: Float64[Tensor, "d_out d"]) -> Float64[Tensor, "d_out d"]:
        blocks = weight.unflatten(-1, (-1, len(self.block)))
        turned: Tensor = blocks @ torch.linalg.inv(self.block).T
        return turned.flatten(-2)

    @property
    def multiply_adds(self) -> int:
        return self.features * len(self.block)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps in BF16, M sqrt(n) rounded: an engine makes M of it.

        M is some BF16 number over the root. Where BF16 is finer around M than around M sqrt(n),
        rounding M sqrt(n) finds that number again; where it is coarser, it may find a neighbour,
        whose quotient is nearer to M than half of M's spacing, and so rounds to M as well.
        """
        return {"matrix": (self.block * math.sqrt(len(self.block))).bfloat16()}

    @classmethod
    def from_tensors(cls, width: int, tensors: Mapping[str, Tensor]) -> "EngineMatrix":
        stored = tensors["matrix"]
        square = stored.dim() == 2 and stored.shape[0] == stored.shape[1]
        if not square or stored.dtype != torch.bfloat16:
            raise FormatError(
                asked=f"the matrix of a transform of kind {cls.kind}",
                found=f"{stored.dtype} {tuple(stored.shape)}",
                why="an engine keeps a square matrix in BF16",
                todo="copy the checkpoint again, or quantize again",
            )
        return cls(width, (stored / math.sqrt(len(stored))).double())


def engine_matrix(features: int, rotation: Float64[Tensor, "n n"]) -> EngineMatrix:
    """What an engine applies when it is given a rotation."""
    stored = (rotation * math.sqrt(len(rotation))).bfloat16()
    return EngineMatrix.from_tensors(features, {"matrix": stored})
