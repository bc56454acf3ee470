"""Block-Hadamard: the data-free baseline that any data-driven rotation must beat.

The normalised Sylvester matrix of size 32 on every MX block, the same at each site (the rotation of
MR-GPTQ, arXiv 2509.23202, and of QuantForge's BRQ adaptation, arXiv 2609.34680). It spreads an
outlier over its own block only; nothing is fitted and no seed enters.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.base import SiteStatistics
from mxtorq.transforms.rotation import BlockRotation


def sylvester(size: int) -> Float64[Tensor, "n n"]:
    """The normalised Sylvester-Hadamard matrix, symmetric and orthogonal.

    Raises:
        UsageError: the size is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise UsageError(
            asked=f"a Sylvester-Hadamard matrix of size {size}",
            found="a size that is not a power of two",
            why="Sylvester's construction doubles a matrix of size 1",
            todo="choose 16, 32, 64 or 128",
        )
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """Block-Hadamard-32 on every input site."""

    def fit(self, statistics: SiteStatistics, seed: int) -> BlockRotation:
        return BlockRotation(statistics.width, sylvester(BLOCK))
