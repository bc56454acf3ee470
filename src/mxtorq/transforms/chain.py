"""Several transforms, one after the other: T = T_1 T_2 ... T_k."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.errors import FormatError
from mxtorq.transforms.base import Transform
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.kronecker import KroneckerRotation
from mxtorq.transforms.permutation import Permutation
from mxtorq.transforms.rotation import BlockRotation
from mxtorq.transforms.torq.rotation import TwoLevelRotation

LINKS: dict[str, type[Transform]] = {
    link.kind: link
    for link in (
        BlockMatrices,
        BlockRotation,
        Diagonal,
        KroneckerRotation,
        Permutation,
        TwoLevelRotation,
    )
}
"""What a chain may consist of, by kind."""


@dataclass(frozen=True, eq=False)
class Chain(Transform):
    """T = links[0] links[1] ...; at least one link, all of one width."""

    kind: ClassVar[str] = "chain"
    links: tuple[Transform, ...]

    def __post_init__(self) -> None:
        kinds = [link.kind for link in self.links]
        if not set(kinds) <= set(LINKS) or len({link.width for link in self.links}) != 1:
            raise FormatError(
                asked="a chain of transforms",
                found=f"{kinds} of the widths {[link.width for link in self.links]}",
                why=f"it consists of {', '.join(LINKS)}, all of one width, at least one",
                todo="leave identities out and choose links of the site's width",
            )

    @property
    def width(self) -> int:
        return self.links[0].width

    def apply(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        for link in self.links:
            values = link.apply(values)
        return values

    def split_blocks(self) -> tuple[Transform | None, Float64[Tensor, "m 32 32"] | None]:
        *first, last = self.links
        rest, matrices = last.split_blocks()
        before = [*first, *([] if rest is None else [rest])]
        return (chain(*before) if before else None), matrices

    def fuse(self, weight: Float64[Tensor, "d_out d"]) -> Float64[Tensor, "d_out d"]:
        for link in self.links:
            weight = link.fuse(weight)
        return weight

    @property
    def multiply_adds(self) -> int:
        return sum(link.multiply_adds for link in self.links)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{at}.{link.kind}.{name}": tensor
            for at, link in enumerate(self.links)
            for name, tensor in link.tensors().items()
        }

    @classmethod
    def from_tensors(cls, width: int, tensors: Mapping[str, Tensor]) -> "Chain":
        found: dict[tuple[int, str], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            at, kind, part = name.split(".", 2)
            found.setdefault((int(at), kind), {})[part] = tensor
        return cls(
            tuple(LINKS[kind].from_tensors(width, found[at, kind]) for at, kind in sorted(found))
        )


def chain(*links: Transform) -> Transform:
    """The links without identities in a `Chain`, or the single one that is left.

    Raises:
        FormatError: only identities were given.
    """
    kept = tuple(link for link in links if link.kind != "identity")
    return kept[0] if len(kept) == 1 else Chain(kept)
