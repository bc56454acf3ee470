"""BRQ: QuaRot's places with rotations that stay inside blocks.

"Block Rotation is All You Need for MXFP4" (arXiv 2511.04214): a global rotation spreads outliers
over blocks that were quiet and lifts their shared scales; a rotation of 32 channels leaves every
outlier in the block whose scale it sets. So R1 of the residual stream is block-diagonal, one 32x32
Hadamard with random signs repeated for all blocks and merged into the weights; values get the same
kind of rotation within each head (R2, merged), and the input of down_proj an online Hadamard-32.

Faithful: the places, the blocks of 32, random signs, the repetition of one block. The paper rounds
weights with GPTQ afterwards; that is the recipe's ``rounding`` here.

Left open, decided here: the random signs enter R1 only; R2 and the online one are plain, as in
QuaRot. The online rotations of queries and keys concern a quantized KV cache and are left out.
Embeddings are not centred: the released code does that before an RMSNorm and so changes the
function (see `surgery.offline`).

Not this: the learned variant of the paper (its blocks as SpinQuant's R1 and R2), and the adaptation
that others report as BRQ, an online Hadamard-32 at every input site, which is `hadamard`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mxtorq.formats.spec import BLOCK
from mxtorq.models.family import SiteName
from mxtorq.transforms.base import (
    Network,
    NetworkShape,
    OfflineRotations,
    SiteStatistics,
    TransformMethod,
)
from mxtorq.transforms.blocks import require_whole_blocks
from mxtorq.transforms.hadamard import require_power_of_two, sylvester
from mxtorq.transforms.quarot import random_signs
from mxtorq.transforms.rotation import BlockRotation, Identity


@dataclass(frozen=True, kw_only=True)
class BRQ(TransformMethod):
    """Block-Hadamard on the residual stream, within heads, and before down_proj."""

    needs_hessian: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False

    size: int = BLOCK
    """Channels that are mixed: a block, or a part or a multiple of it."""

    def __post_init__(self) -> None:
        require_power_of_two(self.size, str(self))

    def check(self, shape: NetworkShape) -> None:
        places = {"the residual stream": shape.hidden, "a head": shape.head_dim}
        if SiteName.DOWN_IN in shape.sites:
            places["the input of down_proj"] = shape.sites[SiteName.DOWN_IN]
        require_whole_blocks("brq", self.size, places, "size")

    def rotations(self, network: Network, seed: int) -> OfflineRotations:
        shape, plain = network.shape, sylvester(self.size)
        signs = random_signs(self.size, torch.Generator().manual_seed(seed))
        head = BlockRotation(shape.head_dim, plain)
        return OfflineRotations(
            residual=BlockRotation(shape.hidden, signs[:, None] * plain),
            heads=(head,) * shape.layers,
        )

    def fit(self, statistics: SiteStatistics, seed: int) -> BlockRotation | Identity:
        if statistics.name is SiteName.DOWN_IN:
            return BlockRotation(statistics.width, sylvester(self.size))
        return Identity(statistics.width)
