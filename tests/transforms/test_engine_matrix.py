"""What an engine applies that keeps a rotation in BF16."""

import math

import pytest
import torch

from mxtorq.errors import FormatError
from mxtorq.transforms import KINDS
from mxtorq.transforms.engine_matrix import EngineMatrix, engine_matrix
from mxtorq.transforms.rotation import BlockRotation

WIDTH = 96
EPS = torch.finfo(torch.float64).eps


def rotations(count: int, size: int = 32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = torch.randn(count, size, size, dtype=torch.float64, generator=draw)
    return [torch.linalg.qr(each).Q for each in made]


@pytest.mark.parametrize("size", [16, 32])
def test_what_is_stored_gives_the_matrix_again(size: int) -> None:
    """As an engine computes it: load in BF16, divide in place."""
    for rotation in rotations(200, size):
        made = engine_matrix(WIDTH, rotation)
        loaded = made.tensors()["matrix"].clone()
        loaded /= math.sqrt(size)
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded.double(), made.block)


def test_every_bf16_number_that_is_stored_comes_back() -> None:
    """All significands in two octaves: the rounding repeats with the exponent."""
    bits = torch.arange(0x3F80, 0x4080, dtype=torch.int16)
    stored = bits.view(torch.bfloat16)
    applied = stored / math.sqrt(32)
    again = (applied.double() * math.sqrt(32)).bfloat16()
    assert torch.equal(again / math.sqrt(32), applied)


def test_products_are_kept_though_the_matrix_is_not_orthogonal() -> None:
    made = engine_matrix(WIDTH, rotations(1)[0])
    identity = torch.eye(32, dtype=torch.float64)
    assert (made.block.T @ made.block - identity).abs().max() > 2.0**-12
    x, w = torch.randn(7, WIDTH, dtype=torch.float64), torch.randn(5, WIDTH, dtype=torch.float64)
    bound = 4 * WIDTH * EPS * 2 * x.norm(dim=1)[:, None] * w.norm(dim=1)  # condition below 2
    assert ((made.apply(x) @ made.fuse(w).T - x @ w.T).abs() <= bound).all()


def test_online_rounds_to_bf16_and_the_map_itself_does_not() -> None:
    made = engine_matrix(WIDTH, rotations(1)[0])
    x = torch.randn(4, WIDTH)
    assert torch.equal(made.online(x), made.apply(x).bfloat16().float())
    assert not torch.equal(made.online(x), made.apply(x))
    assert not made.exact_online
    assert BlockRotation(WIDTH, rotations(1)[0]).exact_online
    read = KINDS[made.kind].from_tensors(WIDTH, made.tensors())
    assert torch.equal(read.apply(x), made.apply(x))
    assert made.multiply_adds == WIDTH * 32


def test_what_is_no_engine_matrix() -> None:
    rotation = rotations(1)[0]
    singular = torch.zeros(32, 32, dtype=torch.float64)
    for features, matrix in ((WIDTH, rotation), (WIDTH, singular), (48, torch.eye(32).double())):
        with pytest.raises(FormatError, match="engine-matrix"):
            EngineMatrix(features, matrix)
