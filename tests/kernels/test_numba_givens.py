"""Givens rotations by numba have the bits of the eager chain and of NumPy's Algorithm 1."""

import numpy as np
import pytest
import torch

import oracles
from mxtorq.errors import FormatError, UsageError
from mxtorq.transforms.torq.inter_block import (
    EMPTY_CHAIN,
    GivensChain,
    equalize,
    exact_target,
    pair_mean,
)

pytest.importorskip("numba")

from mxtorq.kernels.numba.givens import apply_chain_


def chains(sigma: torch.Tensor, **options: object) -> list[GivensChain]:
    return [equalize(sigma, backend=backend, **options) for backend in ("eager", "numba")]


def same(one: GivensChain, two: GivensChain) -> bool:
    return all(
        torch.equal(getattr(one, part), getattr(two, part))
        for part in ("first", "second", "cos", "sin")
    )


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("blocks", [2, 3, 8, 128, 448])
@pytest.mark.parametrize("spread", [1.5, 1e4])
def test_algorithm_1_is_the_same_to_the_bit(blocks: int, spread: float) -> None:
    eager, numba = chains(oracles.spd(blocks, spread, seed=blocks))
    assert len(eager) >= blocks // 2
    assert same(eager, numba)


def test_algorithm_1_at_its_edges() -> None:
    """Nothing to do, one block, a lone variance, a matrix of rank one, ties of the extremes, an
    asymmetric matrix, numbers that are none."""
    lone, tied = torch.zeros(16, 16), torch.diag(torch.tensor([3.0, 1.0] * 8))
    lone[5, 5] = 1.0
    rank_one = torch.outer(torch.arange(1.0, 17.0), torch.arange(1.0, 17.0))
    nan = rank_one.clone()
    nan[3, 3] = torch.nan
    skew = rank_one + torch.triu(torch.ones(16, 16), 1)
    lengths = []
    for sigma in (torch.eye(8), torch.zeros(8, 8), torch.ones(1, 1), lone, tied, rank_one, nan):
        eager, numba = chains(sigma.double())
        assert same(eager, numba)
        lengths.append(len(numba))
    assert lengths == [0, 0, 0, 15, 8, lengths[5], 0]
    assert same(*chains(skew.double()))
    assert same(*chains(skew.double().T))


def test_algorithm_1_stops_where_it_is_told() -> None:
    sigma = oracles.spd(32, 1e3, seed=3)
    before = sigma.clone()
    for options in ({"max_rotations": 0}, {"max_rotations": 7}, {"tolerance": 0.5}):
        eager, numba = chains(sigma, **options)
        assert same(eager, numba)
        assert len(numba) < 31
    assert torch.equal(sigma, before)


def test_other_angles_stay_numpy_s() -> None:
    sigma = oracles.spd(12, 1e3, seed=3)
    assert same(*chains(sigma, angle=pair_mean, max_rotations=40))
    assert not same(
        equalize(sigma, angle=exact_target, backend="numba"),
        equalize(sigma, angle=pair_mean, backend="numba"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2, 32), (3, 8, 32), (5, 6, 128, 32), (9, 24, 7), (24, 1)])
def test_the_chain_is_the_same_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Tokens that do not fill the kernel's steps of four, widths that no vector divides."""
    chain = equalize(oracles.spd(shape[-2], 100.0, seed=1))
    blocks = draw(*shape, dtype=dtype)
    before = blocks.clone()
    eager, numba = (chain.apply(blocks, backend=backend) for backend in ("eager", "numba"))
    assert numba.dtype == dtype
    assert torch.equal(eager, numba)
    assert not torch.equal(eager, before)
    assert torch.equal(blocks, before)


def test_rows_that_are_no_view_and_no_rows_and_no_rotations() -> None:
    chain = equalize(oracles.spd(6, 100.0, seed=1))
    for blocks in (draw(6, 9, 32).transpose(0, 1), draw(0, 6, 32), draw(20, 6, 64)[::2, :, 32:]):
        eager, numba = (chain.apply(blocks, backend=backend) for backend in ("eager", "numba"))
        assert torch.equal(eager, numba)
    blocks = draw(4, 6, 32)
    for backend in ("eager", "numba"):
        same_values = EMPTY_CHAIN.apply(blocks, backend=backend)
        assert torch.equal(same_values, blocks)
        assert same_values.data_ptr() != blocks.data_ptr()


def test_the_eager_chain_in_chunks_is_the_chain_token_by_token() -> None:
    """Also against the lines of the definition, on more tokens than a chunk holds."""
    chain = equalize(oracles.spd(3, 100.0, seed=1))
    blocks = draw(1100, 3, 32)
    expected = blocks.numpy().copy()
    parts = (chain.first, chain.second, chain.cos, chain.sin)
    for i, j, cos, sin in zip(*(part.tolist() for part in parts), strict=True):
        a, b = expected[:, i].copy(), expected[:, j].copy()
        expected[:, i] = np.float32(cos) * a + np.float32(sin) * b
        expected[:, j] = np.float32(cos) * b - np.float32(sin) * a
    for backend in ("eager", "numba"):
        assert np.array_equal(chain.apply(blocks, backend=backend).numpy(), expected)


def test_two_threads_have_the_bits_of_one() -> None:
    chain = equalize(oracles.spd(24, 100.0, seed=1))
    blocks = draw(701, 24, 32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = chain.apply(blocks, backend="numba")
        torch.set_num_threads(2)
        assert torch.equal(chain.apply(blocks, backend="numba"), one)
    finally:
        torch.set_num_threads(threads)


def test_in_place_is_the_same() -> None:
    chain = equalize(oracles.spd(24, 100.0, seed=1))
    blocks = draw(11, 24, 32)
    expected = chain.apply(blocks, backend="eager")
    apply_chain_(blocks, chain.first, chain.second, chain.cos, chain.sin)
    assert torch.equal(blocks, expected)


def test_gradients_and_half_floats_are_eager() -> None:
    """The gradient of sum(y * g) with respect to x is R g: the chain backwards."""
    chain = equalize(oracles.spd(6, 100.0, seed=1))
    blocks, weight = draw(6, 32, dtype=torch.float64), draw(6, 32, dtype=torch.float64) ** 2
    x = blocks.clone().requires_grad_()
    (chain.apply(x) * weight).sum().backward()
    # m = 5 rotations, each a few roundings of numbers no larger than a column of the weight
    bound = 8 * len(chain) * torch.finfo(torch.float64).eps * weight.norm(dim=0)
    assert x.grad is not None
    assert ((x.grad - chain.matrix(6) @ weight).abs() <= bound).all()
    with torch.no_grad():
        assert torch.equal(chain.apply(x, backend="numba"), chain.apply(blocks))
    half = blocks.bfloat16()
    assert torch.equal(chain.apply(half), chain.apply(half, backend="eager"))
    for wanted in (x, half):
        with pytest.raises(UsageError, match="backend='auto'"):
            chain.apply(wanted, backend="numba")


def test_a_chain_that_reaches_beyond_the_blocks_is_refused() -> None:
    """The kernel writes where it is told: nothing else stands between it and other memory."""
    chain = equalize(oracles.spd(6, 100.0, seed=1))
    for backend in ("eager", "numba"):
        with pytest.raises(FormatError, match="block 5"):
            chain.apply(draw(4, 5, 32), backend=backend)
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(FormatError, match="damaged"):
        GivensChain(torch.tensor([1]), torch.tensor([-1]), one, 0 * one)
