"""The pair that TORQ fits: R_inter (x) R_intra, applied level by level (TORQ Algorithm 3).

With a token as a matrix X [B, 32], one block a row, Z = R_inter^T X R_intra. Flattened row by row
this is z = x (R_inter (x) R_intra), so weights become W' = W (R_inter (x) R_intra). The fusion
formula printed in the paper has the factors transposed and swapped: it belongs to a column-major
vec. Online cost a token: 4 multiplications an element of each rotated block pair, and B 32^2
multiply-adds; the dense B x B product would take B^2 32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.errors import FormatError
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import rotate
from mxtorq.transforms.base import Rotation, Transform
from mxtorq.transforms.rotation import require_orthogonal
from mxtorq.transforms.torq.inter_block import GivensChain


@dataclass(frozen=True, eq=False)
class TwoLevelRotation(Rotation):
    """T = R_inter (x) R_intra; ``intra`` None means that level is switched off."""

    kind: ClassVar[str] = "torq"
    features: int
    inter: GivensChain
    intra: Float64[Tensor, "32 32"] | None

    def __post_init__(self) -> None:
        blocks = self.features // BLOCK
        if self.features % BLOCK or self.inter.reach >= blocks:
            raise FormatError(
                asked=f"a {self.kind} rotation of {self.features} features",
                found=f"rotations that reach block {self.inter.reach}",
                why=f"there are {blocks} whole blocks of {BLOCK}",
                todo="fit the rotation at the width of the input that it is for",
            )
        if self.intra is not None:
            require_orthogonal(self.intra, self.kind)

    @property
    def width(self) -> int:
        return self.features

    def apply(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        blocks = self.inter.apply(values.unflatten(-1, (-1, BLOCK)))
        values = blocks.flatten(-2)
        return values if self.intra is None else rotate(values, self.intra[None])

    def split_blocks(self) -> tuple[Transform | None, Float64[Tensor, "m 32 32"] | None]:
        if self.intra is None:
            return self, None
        rest = TwoLevelRotation(self.features, self.inter, None) if len(self.inter) else None
        return rest, self.intra[None]

    @property
    def multiply_adds(self) -> int:
        return 4 * BLOCK * len(self.inter) + (0 if self.intra is None else self.features * BLOCK)

    def tensors(self) -> dict[str, Tensor]:
        parts = {
            "inter.first": self.inter.first,
            "inter.second": self.inter.second,
            "inter.cos": self.inter.cos,
            "inter.sin": self.inter.sin,
        }
        return parts if self.intra is None else {**parts, "intra": self.intra}

    @classmethod
    def from_tensors(cls, width: int, tensors: Mapping[str, Tensor]) -> "TwoLevelRotation":
        chain = GivensChain(
            *(tensors[f"inter.{part}"] for part in ("first", "second", "cos", "sin"))
        )
        return cls(width, chain, tensors.get("intra"))
