"""A chain of Givens rotations between blocks, in the form that the kernel of `two_level` follows.

The kernel keeps a token's blocks in scratch, and reads a block from the activation itself the first
time; which time is the first is known from the chain alone, so it is found here, once for a layer.
Angles are rounded to float32, as eager torch rounds a number that multiplies a float32 tensor.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float32, Float64, Int32, Int64
from torch import Tensor

from mxtorq.errors import UsageError


class Chain(NamedTuple):
    """Givens rotations as the kernel reads them; `prepare` makes it, once for a layer."""

    planes: Int32[Tensor, "steps 2"]
    """The two blocks of each rotation, times 2, plus 1 where no earlier rotation touched it."""
    angles: Float32[Tensor, "steps 2"]
    """Cosine and sine."""
    touched: Int32[Tensor, " blocks"]
    """1 for blocks that some rotation touches."""


def prepare(
    first: Int64[Tensor, " m"],
    second: Int64[Tensor, " m"],
    cos: Float64[Tensor, " m"],
    sin: Float64[Tensor, " m"],
    blocks: int,
    device: torch.device,
) -> Chain:
    """The parts of a `GivensChain` over so many blocks, in the form the kernel reads.

    Raises:
        UsageError: a rotation reaches a block that is not there.
    """
    seen: set[int] = set()
    planes = []
    for pair in zip(first.tolist(), second.tolist(), strict=True):
        planes.append([2 * block + (block not in seen) for block in pair])
        seen.update(pair)
    if seen and not 0 <= min(seen) <= max(seen) < blocks:
        raise UsageError(
            asked=f"a chain of rotations over {blocks} blocks",
            found=f"blocks {min(seen)} to {max(seen)} in it",
            why="a rotation mixes two blocks of the same token",
            todo="pass the chain and the width of the same site",
        )
    touched = torch.zeros(blocks, dtype=torch.int32)
    touched[sorted(seen)] = 1
    return Chain(
        torch.tensor(planes, dtype=torch.int32).view(-1, 2).to(device),
        torch.stack((cos, sin), dim=-1).float().to(device),
        touched.to(device),
    )
