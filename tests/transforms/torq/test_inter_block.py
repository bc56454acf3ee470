"""Schur-Horn: equal variances, by at most B - 1 rotations, and not by the printed angle."""

import math

import numpy as np
import pytest
import torch

import oracles
from mxtorq.errors import FormatError
from mxtorq.transforms.torq.inter_block import (
    EMPTY_CHAIN,
    GivensChain,
    equalize,
    exact_target,
    pair_mean,
)

EPS = torch.finfo(torch.float64).eps


def printed(s_ii: float, s_jj: float, s_ij: float, mean: float) -> tuple[float, float]:
    """The angle printed in the paper: Jacobi's, which diagonalises."""
    theta = 0.5 * math.atan2(2 * s_ij, s_ii - s_jj)
    return math.cos(theta), math.sin(theta)


def diagonal_after(sigma: torch.Tensor, chain: GivensChain) -> torch.Tensor:
    rotation = chain.matrix(len(sigma))
    return torch.diagonal(rotation.T @ sigma @ rotation)


@pytest.mark.parametrize("blocks", [2, 3, 8, 24, 128, 448, 864])
@pytest.mark.parametrize("spread", [1.5, 1e4])
def test_every_variance_becomes_the_mean(blocks: int, spread: float) -> None:
    sigma = oracles.spd(blocks, spread, seed=blocks)
    chain = equalize(sigma)
    mean = torch.trace(sigma) / blocks
    worst = (diagonal_after(sigma, chain) / mean - 1).abs().max().item()
    assert len(chain) <= blocks - 1
    assert worst <= 1e-12


def test_one_dominant_block_and_correlations() -> None:
    """The worst start: all variance in one block, or all blocks equal up to sign."""
    lone = torch.zeros(16, 16, dtype=torch.float64)
    lone[5, 5] = 1.0
    rank_one = torch.outer(*[torch.arange(1.0, 17.0, dtype=torch.float64)] * 2)
    for sigma in (lone, rank_one):
        chain = equalize(sigma)
        mean = torch.trace(sigma) / 16
        assert len(chain) <= 15
        assert torch.allclose(diagonal_after(sigma, chain), mean.expand(16), rtol=1e-12, atol=0)


def test_the_printed_angle_fails() -> None:
    """Control: with any number of rotations it never equalises, and starts by driving apart."""
    sigma = oracles.spd(32, 1e3, seed=3)
    mean = torch.trace(sigma) / 32
    before = (torch.diagonal(sigma) / mean).max().item()
    for steps in (1, 31, 2000):
        after = diagonal_after(sigma, equalize(sigma, angle=printed, max_rotations=steps))
        assert (after / mean).max().item() >= before * (1 - 1e-9)


def test_the_port_s_angle_converges_but_needs_more_rotations() -> None:
    sigma = oracles.spd(32, 1e3, seed=3)
    mean = torch.trace(sigma) / 32
    chain = equalize(sigma, angle=pair_mean, tolerance=1e-6, max_rotations=2000)
    assert 31 < len(chain) < 2000
    assert (diagonal_after(sigma, chain) / mean - 1).abs().max().item() <= 1.1e-6


def test_exact_target_solves_its_equation_and_takes_the_smaller_angle() -> None:
    draw = np.random.default_rng(0)
    for _ in range(500):
        low, high = draw.uniform(0, 1), draw.uniform(1, 100)
        s_ij = draw.uniform(-1, 1) * math.sqrt(low * high)
        mean = draw.uniform(low + 1e-6, high - 1e-6)
        for s_ii, s_jj in ((low, high), (high, low)):
            cos, sin = exact_target(s_ii, s_jj, s_ij, mean)
            reached = cos**2 * s_ii + 2 * sin * cos * s_ij + sin**2 * s_jj
            # six products of numbers up to `high`, each rounded a few times
            assert abs(reached - mean) <= 32 * EPS * high
            other = (s_ii - mean) / (s_jj - mean) / (sin / cos)
            assert abs(sin / cos) <= abs(other) * (1 + 1e-9)


def test_the_chain_is_the_dense_product() -> None:
    """R = G_1 ... G_m, and applying the chain is R^T X, to a bound of m roundings an element."""
    sigma = oracles.spd(12, 100.0, seed=1)
    chain = equalize(sigma)
    dense = torch.eye(12, dtype=torch.float64)
    parts = (chain.first, chain.second, chain.cos, chain.sin)
    steps = zip(*(part.tolist() for part in parts), strict=True)
    for i, j, cos, sin in steps:
        dense = dense @ oracles.givens(12, i, j, cos, sin)
    x = torch.randn(5, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bound = 4 * len(chain) * EPS * x.abs().max() * math.sqrt(12)
    assert (chain.matrix(12) - dense).abs().max() <= 4 * len(chain) * EPS
    assert (chain.apply(x) - dense.T @ x).abs().max() <= bound
    assert (dense.T @ dense - torch.eye(12)).abs().max() <= 4 * len(chain) * EPS


def test_apply_leaves_its_argument() -> None:
    chain = equalize(oracles.spd(4, 10.0, seed=0))
    x = torch.randn(3, 4, 32)
    before = x.clone()
    chain.apply(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("sigma", [torch.eye(8), torch.zeros(8, 8), torch.ones(1, 1)])
def test_nothing_to_do_is_an_empty_chain(sigma: torch.Tensor) -> None:
    assert len(equalize(sigma.double())) == 0


def test_scale_does_not_matter() -> None:
    """A tolerance relative to the mean: the same rotations at any scale of the activations."""
    sigma = oracles.spd(16, 100.0, seed=2)
    small, large = equalize(sigma * 2.0**-40), equalize(sigma * 2.0**40)
    assert torch.equal(small.first, large.first)
    assert torch.equal(small.sin, large.sin)


def test_a_multiple_of_the_identity_changes_nothing() -> None:
    """Why the regularisation that implementations add to Sigma can be left out."""
    sigma = oracles.spd(16, 100.0, seed=2)
    shifted = equalize(sigma + 2.0 * torch.eye(16, dtype=torch.float64))
    plain = equalize(sigma)
    assert torch.equal(plain.first, shifted.first)
    assert torch.allclose(plain.sin, shifted.sin, rtol=1e-9, atol=1e-9)


def test_a_damaged_chain_is_refused() -> None:
    one, half = torch.tensor([1]), torch.tensor([0.5], dtype=torch.float64)
    with pytest.raises(FormatError, match="unit vector"):
        GivensChain(torch.tensor([0]), one, half, half)
    with pytest.raises(FormatError, match="two different axes"):
        GivensChain(one, one, half * 2, half * 0)
    assert len(EMPTY_CHAIN) == 0
