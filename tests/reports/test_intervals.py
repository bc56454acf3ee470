"""Intervals cover what they say, differences are paired, and tables say which of them are real."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from mxtorq.errors import UsageError
from mxtorq.reports.fidelity import interval_cell, marks
from mxtorq.reports.intervals import (
    FEWEST,
    bootstrap_t,
    difference,
    student_half_width,
)
from mxtorq.reports.render import cells, fidelity_tables, footnote
from mxtorq.reports.schema import Results, Row

SIMULATIONS = 500
TEXT = {"source": "t", "tokens": 100, "seqlen": 11, "text_sha256": "a"}

# Differences between models as they may be: alike, with rare large ones on both sides, on one side.
DRAWS = {
    "normal": (lambda draw, n: draw.standard_normal(n), 0.0),
    "t3": (lambda draw, n: draw.standard_t(3, n), 0.0),
    "exponential": (lambda draw, n: draw.exponential(size=n), 1.0),
    "lognormal": (lambda draw, n: np.exp(draw.standard_normal(n)), math.exp(0.5)),
}


def covered(kind: str, count: int, interval: object = bootstrap_t) -> float:
    """The share of simulated intervals that hold the true mean."""
    draws, truth = DRAWS[kind]
    draw = np.random.default_rng(7)
    found = (interval(draws(draw, count), 1000) for _ in range(SIMULATIONS))  # type: ignore[operator]
    return sum(low <= truth <= high for low, high in found) / SIMULATIONS


def four_sigma(level: float) -> float:
    """How far a share of independent simulations may be from its expectation."""
    return 4 * math.sqrt(level * (1 - level) / SIMULATIONS)


@pytest.mark.parametrize("count", [FEWEST, 32])
@pytest.mark.parametrize("kind", ["normal", "t3", "exponential"])
def test_intervals_cover_their_level(kind: str, count: int) -> None:
    assert abs(covered(kind, count) - 0.95) <= four_sigma(0.95)


@pytest.mark.parametrize("count", [FEWEST, 32])
def test_heavy_skewed_losses_cost_five_points_at_most(count: int) -> None:
    assert covered("lognormal", count) >= 0.90 - four_sigma(0.90)


def percentile_interval(values: NDArray[np.float64], resamples: int) -> tuple[float, float]:
    draw = np.random.default_rng(0)
    means = values[draw.integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def test_a_plain_percentile_bootstrap_fails_these_tests() -> None:
    assert abs(covered("normal", FEWEST, percentile_interval) - 0.95) > four_sigma(0.95)
    assert covered("lognormal", FEWEST, percentile_interval) < 0.90 - four_sigma(0.90)


def rows(
    method: str, sums: NDArray[np.float64], seed: int | None = None, **more: object
) -> list[Row]:
    """One row a line of sums [seeds, windows], of ten predictions a window."""
    made = []
    for at, line in enumerate(np.atleast_2d(sums)):
        count = 10 * len(line)
        values: dict[str, object] = {
            "method": method,
            "rounding": None if method == "bf16" else "rtn",
            "scale_rule": "floor",
            "perplexity": max(1.0, math.exp(line.sum() / count)),
            "nll": line.sum() / count,
            "predictions": count,
            "seed": None if method == "bf16" else (seed or 0) + at,
            "outliers": None,
            "windows": {"nll": line.tolist()},
            "provenance": {"evaluation": TEXT},
            **more,
        }
        made.append(Row(**values))  # type: ignore[arg-type]
    return made


def test_seeds_are_a_second_level() -> None:
    """Windows are common to all seeds, seeds shift all windows: neither alone explains the mean."""
    draw = np.random.default_rng(3)
    held = naive = 0
    for _ in range(SIMULATIONS):
        windows = draw.standard_normal(16)
        shifts = 0.5 * draw.standard_normal((4, 1))
        sums = 10 * (windows + shifts + 0.1 * draw.standard_normal((4, 16)))
        found = difference(rows("a", sums), rows("bf16", np.zeros(16)))
        assert found is not None
        held += found.low <= 0 <= found.high
        low, high = bootstrap_t(sums.mean(0) / 10, 400)
        naive += low <= 0 <= high
    assert held / SIMULATIONS >= 0.95 - four_sigma(0.95)
    assert naive / SIMULATIONS < 0.95 - four_sigma(0.95)


def test_one_seed_is_the_interval_of_its_windows() -> None:
    draw = np.random.default_rng(1)
    first, second = draw.exponential(size=(2, 20))
    found = difference(rows("a", first), rows("b", second, seed=5))
    assert found is not None
    low, high = bootstrap_t((first - second) / 10)
    assert found.mean == pytest.approx((first - second).mean() / 10, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.percent() == pytest.approx((100 * math.expm1(low), 100 * math.expm1(high)))


def test_equal_seeds_are_paired() -> None:
    """What a seed does to both methods says nothing about their difference."""
    draw = np.random.default_rng(1)
    shifts = 10 * draw.standard_normal((3, 1))
    noise = draw.standard_normal((2, 3, 20))
    paired = difference(rows("a", noise[0] + shifts), rows("b", noise[1] + shifts))
    apart = difference(rows("a", noise[0] + shifts), rows("b", noise[1] + shifts, seed=7))
    assert paired is not None
    assert apart is not None
    assert paired.mean == pytest.approx(apart.mean, rel=1e-12)
    assert apart.high - apart.low > 5 * (paired.high - paired.low)


def test_students_quantiles() -> None:
    """Of one and two degrees of freedom in closed form, and towards the normal distribution's."""
    assert student_half_width([3.0]) == 0.0
    one = math.tan(math.pi * 0.475)
    two = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert student_half_width([0.0, 2.0]) == pytest.approx(one * 1.0, rel=1e-5)
    assert student_half_width([-1.0, 0.0, 1.0]) == pytest.approx(two / math.sqrt(3), rel=1e-4)
    z = NormalDist().inv_cdf(0.975)
    # Cornish and Fisher's expansion to the third order; the next term is 30^-4 times some tens.
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    expected = z + sum(term / 30**power for power, term in enumerate(terms, 1))
    values = [float(value) for value in range(31)]
    spread = float(np.std(values, ddof=1)) / math.sqrt(31)
    assert student_half_width(values) / spread == pytest.approx(expected, abs=1e-4)


def test_equal_rows_and_lonely_differences() -> None:
    same = np.arange(10.0)
    found = difference(rows("a", same), rows("b", same))
    assert found is not None
    assert (found.mean, found.low, found.high, found.is_real) == (0.0, 0.0, 0.0, False)
    # One window differs: many samples miss it and have no spread, so one end is not known.
    lonely = difference(rows("a", same + np.eye(10)[3]), rows("b", same))
    assert lonely is not None
    assert lonely.high == math.inf
    assert not lonely.is_real


def test_rows_of_other_texts_are_refused_and_few_windows_give_nothing() -> None:
    draw = np.random.default_rng(1)
    few = draw.standard_normal((2, FEWEST - 1))
    assert difference(rows("a", few[0]), rows("b", few[1])) is None
    ours = rows("a", draw.standard_normal(12))
    other = rows("b", draw.standard_normal(12), provenance={"evaluation": {**TEXT, "source": "u"}})
    for bad in (other, rows("b", draw.standard_normal(13)), rows("b", few[1], windows={})):
        with pytest.raises(UsageError, match="window by window") as caught:
            difference(ours, bad)
        assert caught.value.todo
        assert interval_cell(ours, bad[0]) == "-"
    with pytest.raises(UsageError, match="kl"):
        difference(ours, ours, "kl")


def test_the_table_says_which_differences_are_real() -> None:
    draw = np.random.default_rng(1)
    plain = 30 + draw.standard_normal(40)
    good = plain + 1 + 0.3 * draw.standard_normal(40)
    noise = 0.3 * draw.standard_normal(40)
    close = good + noise - noise.mean() + 0.001  # higher for sure, by nothing that is sure
    bad = good + 0.5 + 0.3 * draw.standard_normal(40)
    kl = {"kl": 0.1, "kl_p99": 0.7, "agreement": 0.9, "layer_errors": {"m.0": 0.1, "m.1": 0.01}}
    groups = [rows("bf16", plain), rows("close", close), rows("good", good, **kl), rows("bad", bad)]
    assert marks(groups) == ["-", "tie", "best", "worse"]
    results = Results(rows=tuple(row for group in groups for row in group), versions={})
    table = cells(results)
    assert [line[7] for line in table] == ["-", "tie", "best", "worse"]
    found = difference(groups[2], groups[0])
    assert found is not None
    low, high = found.percent()
    assert table[2][6] == f"{low:+.2f} to {high:+.2f} %"
    assert low < 10.5 < high  # e^0.1 - 1
    assert "bootstrap" in footnote(results)
    page = "".join(fidelity_tables(results))
    assert "| good | none | rtn | floor | 0.1000 | - | 0.700 | 90.00 % | 10.0 / 20.0 dB |" in page
    # A single method has no rival, another profile is another contest.
    assert marks([groups[0], groups[1]]) == ["-", "-"]
    other = [replace(row, outliers="wild") for row in groups[3]]
    assert marks([groups[2], groups[1], other]) == ["best", "tie", "-"]
