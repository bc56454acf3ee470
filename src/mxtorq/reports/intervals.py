"""Which differences between rows are real: paired bootstrap intervals over evaluation windows.

Two rows on one text are compared window by window: the differences of their losses scatter far less
than the losses. A window is the unit that is drawn again, because tokens inside of one depend on
each other. The interval is the bootstrap-t (Efron and Tibshirani, An Introduction to the Bootstrap,
12.5): means of windows drawn with replacement, each divided by its own standard error. With 8
windows it covers 96 % where BCa covers 90 % (normal differences), and 91 % where BCa covers 81 %
(lognormal ones); those are simulated in the tests. Its price is width, so below `FEWEST` windows
nothing is shown.

Several seeds of one method are a second source of scatter. The windows are drawn jointly for all
seeds, which gives the interval of these seeds' mean; seeds are so few that drawing them again would
say nothing, so their mean gets Student's interval, and the two half widths add up as squares (Zou
and Donner, Statistics in Medicine 27, 2008). Equal seeds of both methods met the same calibration
text and are paired too. With one seed an interval is about that seed's model alone.

What it is not: a correction for looking at many rows. At a level of 95 % one of twenty differences
that are nothing looks real. And windows of one document are not quite independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mxtorq.errors import UsageError
from mxtorq.reports.schema import Row

if TYPE_CHECKING:  # importing NumPy would take most of the time of `mxtorq --help`
    import numpy as np
    from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 4000
FEWEST = 8
"""Windows below which no interval is given."""

_SEED = 0
_DRAWN_AT_ONCE = 2**22

# Student's 97.5 % quantile for 1 to 30 degrees of freedom; more seeds get the last, a little wide.
_STUDENT = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean difference of a prediction and where it lies at a level of 95 %."""

    mean: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether no difference at all lies outside."""
        return self.low > 0 or self.high < 0

    def percent(self) -> tuple[float, float]:
        """Of a difference of ``nll``: both ends as a change of the perplexity in percent."""
        low, high = (100 * math.expm1(min(end, 700.0)) for end in (self.low, self.high))
        return low, high


def difference(rows: Sequence[Row], others: Sequence[Row], figure: str = "nll") -> Interval | None:
    """The mean of ``rows`` minus that of ``others``, of a prediction; None below `FEWEST` windows.

    Args:
        rows: one method, all its seeds.
        others: another one, or the baseline.
        figure: ``nll``, ``kl`` or ``agreement``. The exponential of a difference of ``nll`` is the
            ratio of the perplexities.

    Raises:
        UsageError: rows of different texts, or without that figure by window.
    """
    import numpy as np

    require_paired([*rows, *others], figure)
    count = len(rows[0].windows[figure])
    if count < FEWEST:
        return None
    each = count / rows[0].predictions
    first, second = (
        {row.seed: np.asarray(row.windows[figure]) * each for row in some}
        for some in (rows, others)
    )
    windows = np.mean(list(first.values()), 0) - np.mean(list(second.values()), 0)
    mean = float(windows.mean())
    low, high = bootstrap_t(windows)
    below, above = mean - low, high - mean
    if set(first) == set(second):
        groups = [[float((first[seed] - second[seed]).mean()) for seed in first]]
    else:
        groups = [[float(sums.mean()) for sums in some.values()] for some in (first, second)]
    for means in groups:
        scatter = student_half_width(means)
        below, above = math.hypot(below, scatter), math.hypot(above, scatter)
    return Interval(mean=mean, low=mean - below, high=mean + above)


def bootstrap_t(values: "NDArray[np.float64]", resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % bootstrap-t interval of the mean of independent values, [n] with n >= 2.

    A drawn sample of equal values has no standard error of its own: its t is infinite, unless its
    mean is that of all. Quantiles are values that occur, the outer ones.
    """
    import numpy as np

    count, mean = len(values), values.mean()
    spread = values.std(ddof=1)
    if spread == 0:
        return float(mean), float(mean)
    draw = np.random.default_rng(_SEED)
    t = np.empty(resamples)
    step = max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, resamples, step):
        here = t[start : start + step]
        sample = values[draw.integers(0, count, (len(here), count))]
        away, own = sample.mean(1) - mean, sample.std(1, ddof=1)
        never = np.copysign(np.where(away == 0, 0.0, np.inf), away)
        here[:] = np.divide(away, own, out=never, where=own > 0)
    t.sort()
    rank = math.floor((1 - LEVEL) / 2 * (resamples - 1))
    return float(mean - t[-1 - rank] * spread), float(mean - t[rank] * spread)


def student_half_width(means: Sequence[float]) -> float:
    """Half of Student's 95 % interval of the mean of a few values; 0 for a single one."""
    count = len(means)
    if count < 2:
        return 0.0
    centre = sum(means) / count
    variance = sum((mean - centre) ** 2 for mean in means) / (count - 1)
    return _STUDENT[min(count - 1, len(_STUDENT)) - 1] * math.sqrt(variance / count)


def are_paired(rows: Sequence[Row], figure: str = "nll") -> bool:
    """Whether rows hold a figure window by window of the same text."""
    texts = [row.provenance.get("evaluation") for row in rows]
    counts = {(row.predictions, len(row.windows.get(figure, ()))) for row in rows}
    same = all(text == texts[0] for text in texts)
    return same and len(counts) == 1 and all(row.windows.get(figure) for row in rows)


def require_paired(rows: Sequence[Row], figure: str = "nll") -> None:
    """Raises:
    UsageError: rows cannot be compared window by window.
    """
    if not are_paired(rows, figure):
        found = [
            f"{row.method}: {len(row.windows.get(figure, ()))} windows of "
            f"{(row.provenance.get('evaluation') or {}).get('source')}"
            for row in rows
        ]
        raise UsageError(
            asked=f"the difference of {figure} between rows",
            found="; ".join(dict.fromkeys(found)),
            why="rows are compared window by window, so both need that figure on one text",
            todo="evaluate both in one `mxtorq compare`, or on the same --text, --eval-tokens and "
            "--seqlen with this release",
        )
