"""Sums in float32 stay within their derived bound, the Hessian is symmetric, NaN is found."""

import pytest
import torch

import oracles
from mxtorq.calibration.statistics import (
    TOKENS_AT_ONCE,
    SiteAccumulator,
    channel_amax,
    mirror_,
)
from mxtorq.errors import ModelError
from mxtorq.models.family import SiteName


def accumulated(rows: torch.Tensor, batch: int) -> torch.Tensor:
    accumulator = SiteAccumulator("site", rows.shape[1], len(rows), seed=0)
    for part in rows.split(batch):
        accumulator.add(part)
    return accumulator.take_hessian()


def exact(rows: torch.Tensor) -> torch.Tensor:
    wide = rows.double()
    return wide.T @ wide / len(rows)


def bound(rows: torch.Tensor, terms: int) -> torch.Tensor:
    """What float32 sums of so many products may be off by, and the float64 ones around them."""
    share = terms * 2.0**-24 / (1 - terms * 2.0**-24) + 2 * len(rows) * 2.0**-53
    return share * exact(rows.abs())


@pytest.mark.parametrize("width", [96, 512, 1100])
@pytest.mark.parametrize("batch", [100, 700])
def test_the_hessian_is_within_its_bound_and_exactly_symmetric(width: int, batch: int) -> None:
    """One panel, exactly one, and two with a third that is shorter."""
    rows = oracles.activations(700, width, outliers=5, seed=2)
    found = accumulated(rows, batch)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert ((found - exact(rows)).abs() <= bound(rows, batch)).all()
    assert not torch.equal(found, exact(rows))  # or there would be no bound to test


def test_no_sum_has_more_terms_than_it_may() -> None:
    """A batch of three sums' tokens is what three batches are."""
    rows = oracles.activations(3 * TOKENS_AT_ONCE, 32, outliers=2, seed=3)
    found = accumulated(rows, len(rows))
    assert torch.equal(found, accumulated(rows, TOKENS_AT_ONCE))
    assert ((found - exact(rows)).abs() <= bound(rows, TOKENS_AT_ONCE)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_widened_first(dtype: torch.dtype) -> None:
    rows = oracles.activations(300, 64, outliers=3, seed=4).to(dtype)
    assert torch.equal(accumulated(rows, 300), accumulated(rows.float(), 300))
    # The products themselves are exact in float32.
    assert torch.equal(accumulated(rows[:1], 1), exact(rows[:1]))


def test_float64_and_very_large_inputs_are_multiplied_in_float64() -> None:
    rows = oracles.activations(300, 64, outliers=3, seed=5)
    for values in (rows.double() + 1e-9, rows * 2.0**100):
        found = accumulated(values, 300)
        share = 2 * 300 * 2.0**-53
        assert ((found - exact(values)).abs() <= share * exact(values.abs())).all()


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_the_largest_magnitudes(tokens: int) -> None:
    rows = oracles.activations(tokens, 96, outliers=3, seed=6)
    assert torch.equal(channel_amax(rows), rows.abs().amax(0))
    for bad in (torch.nan, torch.inf, -torch.inf):
        rows[tokens // 2, 5] = bad
        found = channel_amax(rows)
        assert not found[5].isfinite()
        assert int(found.isfinite().sum()) == 95


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_what_is_broken_is_named_by_its_tokens(bad: float) -> None:
    accumulator = SiteAccumulator("layers.3.o_in", 32, 100, seed=0)
    accumulator.add(torch.ones(60, 32))
    rows = torch.ones(2, 20, 32)
    rows[1, 19, 31] = bad
    with pytest.raises(ModelError, match=r"layers\.3\.o_in(.|\n)*tokens 60 to 99"):
        accumulator.add(rows)


def test_an_empty_batch_adds_nothing() -> None:
    accumulator = SiteAccumulator("site", 32, 10, seed=0)
    accumulator.add(torch.ones(0, 32))
    accumulator.add(torch.ones(10, 32))
    statistics = accumulator.finish(SiteName.O_IN, ())
    assert torch.equal(statistics.hessian, torch.ones(32, 32, dtype=torch.float64))
    assert torch.equal(statistics.amax, torch.ones(32))
    assert statistics.tokens == len(statistics.sample) == 10


def test_a_mirror_takes_the_upper_triangle() -> None:
    matrix = torch.randn(700, 700, dtype=torch.float64)
    upper = matrix.triu()
    mirror_(matrix)
    assert torch.equal(matrix, upper + upper.triu(1).T)
