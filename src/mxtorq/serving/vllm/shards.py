"""A transform of some of the channels, as a rank of tensor parallelism sees them.

A linear that is split by its outputs (q, k, v, gate, up) gets all channels of its input on every
rank. One that is split by its inputs (o and down) gets a run of channels on each. Maps within
blocks are cut along with the channels; blocks of 32 stay whole, since a rank without whole blocks
could not round either. A map that mixes channels of several ranks needs them all: then the caller
gathers the input, and each rank transforms the whole of it.
"""

from mxtorq.transforms.base import Transform
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.chain import Chain
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.engine_matrix import EngineMatrix
from mxtorq.transforms.permutation import Permutation
from mxtorq.transforms.rotation import BlockRotation, Identity
from mxtorq.transforms.torq.rotation import TwoLevelRotation


def part_of(transform: Transform, start: int, stop: int) -> Transform | None:
    """The map of the channels from ``start`` to ``stop``, if no others flow into them or out."""
    width = stop - start
    match transform:
        case Identity():
            return Identity(width)
        case Diagonal():
            return Diagonal(transform.factors[start:stop])
        case BlockRotation(rotation=rotation):
            whole = _whole(start, width, len(rotation))
            return BlockRotation(width, rotation) if whole else None
        case EngineMatrix(block=block):
            return EngineMatrix(width, block) if _whole(start, width, len(block)) else None
        case BlockMatrices(matrices=matrices):
            size = matrices.shape[1]
            part = matrices[start // size : stop // size]
            return BlockMatrices(part) if _whole(start, width, size) else None
        case Permutation(order=order):
            mine = order[start:stop] - start
            return Permutation(mine) if int(mine.min()) >= 0 and int(mine.max()) < width else None
        case TwoLevelRotation(inter=inter, intra=intra) if len(inter) == 0:
            return TwoLevelRotation(width, inter, intra)
        case Chain(links=links):
            parts = [part_of(link, start, stop) for link in links]
            kept = tuple(part for part in parts if part is not None)
            return Chain(kept) if len(kept) == len(links) else None
    return None


def _whole(start: int, width: int, size: int) -> bool:
    """Whether a run of channels consists of whole blocks."""
    return start % size == 0 and width % size == 0
