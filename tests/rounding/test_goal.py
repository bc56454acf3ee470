"""Who wins a row is what float64 says, and bounds hold; most rows need no float64."""

from functools import cache
from typing import Any

import pytest
import torch

import oracles
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.kernels.dispatch import dequantize, quantize
from mxtorq.rounding import goal as module
from mxtorq.rounding.factor import Factor, factorize
from mxtorq.rounding.goal import Sums, better_rows, bounds, goal, no_sums
from mxtorq.rounding.half import halve


def weight(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@cache
def moments(width: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    few = torch.randn(width // 3, width, dtype=torch.float64, generator=draw)
    ones = torch.ones(width, width, dtype=torch.float64)
    unseen = oracles.spd(width, 1e3, seed=6)
    unseen[[0, 40]], unseen[:, [0, 40]] = 0.0, 0.0
    return {
        "plain": oracles.spd(width, 1.0, seed=3),
        "loud": oracles.spd(width, 1e8, seed=4),
        "rank": few.T @ few,
        "ones": ones,
        "unseen": unseen,
        "huge": oracles.spd(width, 1e3, seed=5) * 2.0**200,
        "tiny": oracles.spd(width, 1e3, seed=5) * 2.0**-200,
    }


MOMENTS = list(moments(64))


def sums_of(errors: torch.Tensor, factor: Factor) -> Sums:
    """As GPTQ has them at its end, here from one product."""
    columns, everything = factor.columns(errors), slice(0, errors.shape[1])
    sums = no_sums(len(errors), errors.device)
    sums.add_errors_(factor, everything, columns)
    sums.add_outputs_(factor, everything, factor.pull @ columns)
    return sums


def candidates(w: torch.Tensor) -> tuple[MXFP4, MXFP4]:
    """Two roundings: each is better in some rows, in some they are nearly or wholly the same."""
    plain, other, bad = (
        quantize(factor * w, rule)
        for factor, rule in (
            (1.0, ScaleRule.FLOOR),
            (1.01, ScaleRule.EVEN),
            (0.9, ScaleRule.FLOOR),
        )
    )
    assert isinstance(plain, MXFP4)
    assert isinstance(other, MXFP4)
    for ours, theirs, worse in zip(other, plain, bad, strict=True):
        ours[::5] = theirs[::5]
        ours[1::5] = worse[1::5]
        ours[2::5] = theirs[2::5]
    other.packed[2::5, 3] ^= 1  # one code is another
    return other, plain


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("damping", [0.01, 3.0])
def test_a_goal_lies_between_its_bounds(kind: str, damping: float) -> None:
    moment = moments(96)[kind]
    w = torch.cat((weight(20, 96), weight(4, 96) * 2.0**-140, weight(4, 96) * 2.0**60))
    factor = factorize(moment, torch.arange(96).flip(0), damping)
    rounded = quantize(w, ScaleRule.FLOOR)
    least, most = bounds(sums_of(w - dequantize(rounded), factor), factor, 96)
    found = goal(rounded, w, moment)
    assert (least <= found).all()
    assert (found <= most).all()
    if (kind, damping) == ("plain", 0.01):  # and they are of use
        assert (most - least < 0.01 * found)[:20].all()


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("width", [64, 1056])
def test_who_wins_is_what_float64_says(kind: str, width: int) -> None:
    """One panel of columns, and two with a third that is shorter."""
    moment, w = moments(width)[kind], weight(60, width)
    ours, plain = candidates(w)
    factor = factorize(moment, torch.arange(width), 0.01)
    sums = sums_of(w - dequantize(ours), factor)
    found = better_rows(sums, width, ours, plain, w, moment, factor)
    expected = goal(ours, w, moment) < goal(plain, w, moment)
    assert torch.equal(found, expected)
    assert torch.equal(better_rows(sums, width, ours, plain, w, halve(moment), factor), expected)
    assert not found[::5].any()
    assert found.any()
    assert not found[1::5].all()


def test_float64_is_for_rows_that_are_not_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(rounded: Any, *others: Any) -> torch.Tensor:
        asked.append(len(rounded.packed))
        return goal(rounded, *others)

    monkeypatch.setattr(module, "goal", counted)
    w, moment = weight(300, 640), moments(640)["plain"]
    plain = quantize(w, ScaleRule.FLOOR)
    worse = quantize(1.2 * w, ScaleRule.FLOOR)
    factor = factorize(moment, torch.arange(640), 0.01)
    for ours, theirs, wins in ((plain, worse, True), (worse, plain, False), (plain, plain, False)):
        sums = sums_of(w - dequantize(ours), factor)
        found = better_rows(sums, 640, ours, theirs, w, moment, factor)
        assert torch.equal(found, torch.full((300,), wins))
    assert asked == []
    # Without a bound that is of use every row is asked for.
    better_rows(sums_of(w - dequantize(plain), factor), 2**24, plain, worse, w, moment, factor)
    assert asked == [300, 300]


def test_products_that_are_not_of_float32_decide_nothing_wrong() -> None:
    w, moment = weight(60, 64), moments(64)["loud"]
    ours, plain = candidates(w)
    factor = factorize(moment, torch.arange(64), 0.01)
    sums = sums_of(w - dequantize(ours), factor)
    narrow = bounds(sums, factor, 64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        wide = bounds(sums, factor, 64)
        found = better_rows(sums, 64, ours, plain, w, moment, factor)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (wide[0] < narrow[0]).all()
    assert (wide[1] > narrow[1]).all()
    assert torch.equal(found, goal(ours, w, moment) < goal(plain, w, moment))


def test_moments_of_a_channel_without_a_second_moment_count_too() -> None:
    """No inputs have them; still, the goal is the one that was passed in."""
    moment = moments(64)["plain"].clone()
    moment[7, 7] = 0.0
    w = weight(60, 64)
    ours, plain = candidates(w)
    factor = factorize(moment, torch.arange(64), 0.01)
    sums = sums_of(w - dequantize(ours), factor)
    found = better_rows(sums, 64, ours, plain, w, moment, factor)
    assert torch.equal(found, goal(ours, w, moment) < goal(plain, w, moment))
