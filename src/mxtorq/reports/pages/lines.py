"""Rows that differ in their seed, as one line each: what they lose, and how that is written.

The order of lines is that of everything that is drawn of them: profile by profile, rules of the
format before those that no hardware has, and within a rule least loss first, failures last.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mxtorq.reports.intervals import are_paired, difference
from mxtorq.reports.schema import Results, Row, groups


@dataclass(frozen=True)
class Line:
    """Rows that differ in their seed, and what they lose against the baseline, in percent."""

    rows: list[Row]
    losses: tuple[float, ...]
    interval: tuple[float, float] | None = None
    """Where the mean of the losses lies at a level of 95 %, in percent."""

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def mean(self) -> float:
        """Over the seeds; infinite where one of them failed, NaN without a baseline."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    @property
    def rule(self) -> str:
        return self.first.rules or "-"

    @property
    def rounding(self) -> str:
        return self.first.rounding or "-"


def lines_of(results: Results) -> list[Line]:
    """Without the baselines, best first within profile and rule; OCP before the others."""
    base = {row.outliers: row for row in results.rows if row.rounding is None}
    lines = []
    for rows in groups(results):
        if rows[0].rounding is not None:
            plain = base.get(rows[0].outliers)
            losses = [100 * (r.perplexity / plain.perplexity - 1) for r in rows] if plain else []
            lines.append(Line(rows, tuple(losses), _interval(rows, plain)))
    profiles = list(dict.fromkeys(line.first.outliers for line in lines))
    rules = list(dict.fromkeys(line.rule for line in lines))

    def order(line: Line) -> tuple[int, bool, int, bool, float]:
        failed = not math.isfinite(line.mean)
        loss = 0.0 if failed else line.mean
        profile, rule = profiles.index(line.first.outliers), rules.index(line.rule)
        return profile, not line.first.ocp, rule, failed, loss

    return sorted(lines, key=order)


def _interval(rows: list[Row], plain: Row | None) -> tuple[float, float] | None:
    if plain is None or not are_paired([*rows, plain]):
        return None
    found = difference(rows, [plain])
    return None if found is None else found.percent()


def profile_of(row: Row) -> str:
    """In the words of a heading."""
    return f"Outliers of {row.outliers}" if row.outliers else "The model as it is"


def panels(lines: list[Line]) -> Iterator[tuple[str, str, list[Line]]]:
    """Lines of one outlier profile and one scale rule, behind headings that name the two."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        apart = "" if line.first.ocp else " (not OCP: no hardware has these scales)"
        key = (profile_of(line.first), f"Scale rule {line.rule}{apart}")
        found.setdefault(key, []).append(line)
    for (profile, rule), panel in found.items():
        yield profile, rule, panel


def roundings(lines: list[Line]) -> tuple[str, ...]:
    """The most used first, so that the first colours and shapes mean what is there most."""
    names = [line.rounding for line in lines]
    return tuple(sorted(dict.fromkeys(names), key=lambda name: (-names.count(name), name)))


def percent(loss: float) -> str:
    """As it is written everywhere."""
    return f"{loss:+.2f} %" if abs(loss) < 1000 else f"{loss:+,.0f} %"


def known(loss: float) -> float:
    """Failures count as the largest loss."""
    return loss if math.isfinite(loss) else math.inf


def least(lines: list[Line]) -> Line:
    """The best of them."""
    return min(lines, key=lambda line: known(line.mean))


def is_direct(line: Line) -> bool:
    """No transform, plain rounding: what every method has to beat."""
    return line.first.method == "identity" and line.rounding == "rtn"


def told(line: Line) -> str:
    """A loss and what lost it."""
    row = line.first
    return f"{percent(line.mean)} ({row.method}, {row.rounding}, scale rule {row.rules})"
