"""Half of a symmetric matrix is the matrix."""

import pytest
import torch

import oracles
from mxtorq.rounding.half import halve


@pytest.mark.parametrize("width", [32, 512, 1056])
def test_it_becomes_whole_again(width: int) -> None:
    matrix = oracles.spd(width, 1e4, seed=1)
    matrix = matrix.triu() + matrix.triu(1).T
    before = matrix.clone()
    half = halve(matrix)
    assert torch.equal(matrix, before)
    matrix.zero_()
    assert torch.equal(half.whole(), before)
    assert sum(part.numel() for part in half.parts) <= width * (width + 512) / 2


def test_it_is_the_same_quadratic_form() -> None:
    matrix = torch.randn(64, 64, dtype=torch.float64)
    whole = halve(matrix).whole()
    assert torch.equal(whole, (matrix + matrix.T) / 2)


def test_products_are_those_of_the_whole() -> None:
    """Sums of 2 d terms, relative to their magnitudes; over several panels."""
    width, draw = 1056, torch.Generator().manual_seed(2)
    matrix = oracles.spd(width, 1e4, seed=1)
    matrix = (matrix + matrix.T) / 2
    left, right = torch.randn(2, 5, width, dtype=torch.float64, generator=draw)
    found = halve(matrix).products(left, right)
    expected = torch.einsum("ri,ij,rj->r", left, matrix, right)
    size = torch.einsum("ri,ij,rj->r", left.abs(), matrix.abs(), right.abs())
    assert ((found - expected).abs() <= 8 * width * torch.finfo(torch.float64).eps * size).all()
    assert torch.equal(halve(matrix).diagonal(), matrix.diagonal())
