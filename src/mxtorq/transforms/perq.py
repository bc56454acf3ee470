"""PeRQ: Permute, Rotate, then Quantize (arXiv 2601.22347).

A block rotation can spread an outlier over its own block only: after a normalised Hadamard matrix
of size n, no entry is larger than the block's l1 norm divided by sqrt(n). The bound of a whole
token is therefore best when all blocks carry the same l1 mass, and channels may be reordered to
get there. It is the published counterpart of TORQ's inter-block stage: moving channels to other
blocks in place of mixing blocks.

Faithful: a greedy calibration that evens out the expected blockwise l1 norm, then block-Hadamard.
Left open by the abstract, which is what this was written from, and decided here: channels in
descending order of their mean |x| over the sample, each to the block of least mass that has room.
That leaves the masses of any two blocks no further apart than the mass of the largest channel.

What it is not: free at run time. The paper merges its permutations into neighbouring weights where
the network is equivariant to them; here the order is a gather of the input before each site. The
paper's learned rotations and its rounding (Qronos) are left out.
"""

import heapq
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.base import NetworkShape, SiteStatistics, Transform, TransformMethod
from mxtorq.transforms.blocks import require_nesting, require_whole_blocks
from mxtorq.transforms.chain import chain
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.permutation import Permutation
from mxtorq.transforms.rotation import BlockRotation


def balanced_order(mass: Float[Tensor, " d"], block: int) -> Int64[Tensor, " d"]:
    """The order of channels whose consecutive blocks have nearly equal mass.

    Ties go to the lower channel and the lower block. Any two blocks differ by at most the largest
    mass of a channel.

    Args:
        mass: non-negative, one a channel.
        block: channels a block; it divides the number of channels.
    """
    weight = mass.double().cpu()
    blocks: list[list[int]] = [[] for _ in range(len(weight) // block)]
    lightest = [(0.0, at) for at in range(len(blocks))]  # a heap: only blocks that have room
    values = weight.tolist()
    for channel in torch.argsort(weight, descending=True, stable=True).tolist():
        filled, at = heapq.heappop(lightest)
        blocks[at].append(channel)
        if len(blocks[at]) < block:
            heapq.heappush(lightest, (filled + values[channel], at))
    return torch.tensor([channel for members in blocks for channel in members])


@dataclass(frozen=True, kw_only=True)
class PeRQ(TransformMethod):
    """A permutation that balances the blocks' l1 mass, then block-Hadamard."""

    needs_hessian: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False

    size: int = BLOCK
    """Channels a block of the permutation and of the Hadamard matrix; a power of two."""
    rotate: bool = True
    """False: the permutation alone, the ablation."""

    def __post_init__(self) -> None:
        require_nesting("perq", self.size)
        sylvester(self.size)  # refuses what is no power of two

    def check(self, shape: NetworkShape) -> None:
        require_whole_blocks("perq", self.size, shape.sites, "size")

    def fit(self, statistics: SiteStatistics, seed: int) -> Transform:
        require_whole_blocks("perq", self.size, {statistics.site: statistics.width}, "size")
        mass = statistics.sample.double().abs().mean(0)
        order = Permutation(balanced_order(mass, self.size))
        if not self.rotate:
            return order
        return chain(order, BlockRotation(statistics.width, sylvester(self.size)))
