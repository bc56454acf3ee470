"""A part of a transform is the transform on those channels, or there is none."""

import pytest
import torch

from mxtorq.serving.vllm.shards import part_of
from mxtorq.transforms.base import Transform
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.chain import Chain
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.engine_matrix import engine_matrix
from mxtorq.transforms.kronecker import KroneckerRotation
from mxtorq.transforms.permutation import Permutation
from mxtorq.transforms.rotation import BlockRotation, Identity
from mxtorq.transforms.torq.inter_block import GivensChain
from mxtorq.transforms.torq.rotation import TwoLevelRotation

WIDTH = 128


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw(size))).Q


def givens(*pairs: tuple[int, int]) -> GivensChain:
    planes = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    cos = torch.full((len(pairs),), 0.8, dtype=torch.float64)
    sin = torch.full((len(pairs),), 0.6, dtype=torch.float64)
    return GivensChain(planes[:, 0], planes[:, 1], cos, sin)


FACTORS = torch.rand(WIDTH, dtype=torch.float64, generator=draw(1)) + 0.5
MATRICES = torch.randn(WIDTH // 32, 32, 32, dtype=torch.float64, generator=draw(2))
WITHIN = torch.cat([torch.randperm(64, generator=draw(3)) + 64 * half for half in range(2)])

CUT: dict[str, Transform] = {
    "identity": Identity(WIDTH),
    "diagonal": Diagonal(FACTORS),
    "shared matrix": BlockRotation(WIDTH, orthogonal(32)),
    "shared matrix of 64": BlockRotation(WIDTH, orthogonal(64)),
    "what an engine applies": engine_matrix(WIDTH, orthogonal(32)),
    "a matrix a block": BlockMatrices(MATRICES),
    "permutation within": Permutation(WITHIN),
    "torq without pairs": TwoLevelRotation(WIDTH, givens(), orthogonal(32)),
    "chain": Chain((Diagonal(FACTORS), BlockRotation(WIDTH, orthogonal(32)))),
}
WHOLE: dict[str, Transform] = {
    "shared matrix of 128": BlockRotation(WIDTH, orthogonal(128)),
    "matrices of 128": BlockMatrices(orthogonal(128)[None]),
    "permutation across": Permutation(torch.randperm(WIDTH, generator=draw(4))),
    "kronecker": KroneckerRotation(torch.ones(WIDTH).double(), (orthogonal(4), orthogonal(32))),
    "torq": TwoLevelRotation(WIDTH, givens((0, 3)), orthogonal(32)),
    "chain": Chain((Diagonal(FACTORS), Permutation(torch.arange(WIDTH).flip(0)))),
}


@pytest.mark.parametrize("name", CUT)
def test_a_part_does_what_the_whole_does_there(name: str) -> None:
    values = torch.randn(5, WIDTH, dtype=torch.float64, generator=draw(5))
    expected = CUT[name].apply(values)
    for start in (0, 64):
        here = slice(start, start + 64)
        part = part_of(CUT[name], start, start + 64)
        assert part is not None
        assert part.width == 64
        # Sums of up to 64 products of each: (64 + 2) eps times the sum of magnitudes, and the
        # magnitudes stay below 64 * 10 * 10.
        bound = 66 * torch.finfo(torch.float64).eps * 64 * 100
        assert (part.apply(values[:, here]) - expected[:, here]).abs().max() <= bound


@pytest.mark.parametrize("name", WHOLE)
def test_what_mixes_all_channels_has_no_parts(name: str) -> None:
    assert part_of(WHOLE[name], 0, 64) is None
    assert part_of(WHOLE[name], 64, 128) is None
