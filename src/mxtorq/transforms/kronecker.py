"""A full-width rotation that costs d (1 + sum n_i), not d^2: signs and a Kronecker product.

T = diag(signs) (F_1 (x) F_2 (x) ... (x) F_k), features in row-major order of the factors' axes. A
Hadamard matrix of every size that is in use is such a product: see `hadamard.factors`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.errors import FormatError
from mxtorq.transforms.base import Rotation
from mxtorq.transforms.rotation import require_orthogonal


@dataclass(frozen=True, eq=False)
class KroneckerRotation(Rotation):
    """T = diag(signs) (F_1 (x) ... (x) F_k); signs are 1 or -1."""

    kind: ClassVar[str] = "kronecker-rotation"
    signs: Float64[Tensor, " d"]
    factors: tuple[Float64[Tensor, "_ _"], ...]

    def __post_init__(self) -> None:
        for factor in self.factors:
            require_orthogonal(factor, self.kind)
        product = math.prod(len(factor) for factor in self.factors)
        if product != self.width or not bool((self.signs.abs() == 1).all()):
            raise FormatError(
                asked=f"a {self.kind} of {self.width} features",
                found=f"factors of sizes {[len(factor) for factor in self.factors]}, signs between "
                f"{self.signs.min()} and {self.signs.max()}",
                why="the sizes must multiply to the width and signs be 1 or -1",
                todo="factor the width itself",
            )

    @property
    def width(self) -> int:
        return len(self.signs)

    def apply(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        rows = values * self.signs.to(values.dtype)
        # Each pass contracts the leading feature axis and puts the result last: after all of them
        # the axes are in their old order.
        for factor in self.factors:
            rows = rows.unflatten(-1, (len(factor), -1)).transpose(-1, -2)
            rows = (rows @ factor.to(values.dtype)).flatten(-2)
        return rows

    @property
    def multiply_adds(self) -> int:
        return self.width * (1 + sum(len(factor) for factor in self.factors))

    def tensors(self) -> dict[str, Tensor]:
        parts = {f"factor.{index}": factor for index, factor in enumerate(self.factors)}
        return {"signs": self.signs, **parts}

    @classmethod
    def from_tensors(cls, width: int, tensors: Mapping[str, Tensor]) -> "KroneckerRotation":
        count = len(tensors) - 1
        return cls(tensors["signs"], tuple(tensors[f"factor.{at}"] for at in range(count)))
