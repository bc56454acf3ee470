"""One factor a channel: T = diag(f). What smoothing and balancing consist of.

Where a site's input comes from a norm or from one row of a linear each, `surgery` moves the factors
there and nothing is left to do at run time; elsewhere they cost one multiplication an element.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.errors import FormatError
from mxtorq.transforms.base import Transform


@dataclass(frozen=True, eq=False)
class Diagonal(Transform):
    """T = diag(factors)."""

    kind: ClassVar[str] = "diagonal"
    factors: Float64[Tensor, " d"]

    def __post_init__(self) -> None:
        if not bool((torch.isfinite(self.factors) & (self.factors > 0)).all()):
            raise FormatError(
                asked=f"a {self.kind} transform",
                found="factors that are zero, negative, NaN or Inf",
                why="weights are divided by them",
                todo="pass positive numbers",
            )

    @property
    def width(self) -> int:
        return len(self.factors)

    def apply(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        return values * self.factors.to(values.dtype)

    def fuse(self, weight: Float64[Tensor, "d_out d"]) -> Float64[Tensor, "d_out d"]:
        return weight / self.factors

    @property
    def multiply_adds(self) -> int:
        return self.width

    def tensors(self) -> dict[str, Tensor]:
        return {"factors": self.factors}

    @classmethod
    def from_tensors(cls, width: int, tensors: Mapping[str, Tensor]) -> "Diagonal":
        return cls(tensors["factors"])
