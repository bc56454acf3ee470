"""What a method that chooses has taken at each site and why: counts, gains and runners-up.

A manifest keeps for every site the candidate that was taken, what those that were compared to the
end lose on held-out calibration tokens, and of the others a bound: what they lose at least
(`export.manifest.SiteEntry`). A row of results keeps the names alone. What is counted and compared
is so here, once; tables, charts, the model card and the terminal only write it down.

A loss is a part of what the inputs of one site do, so that losses of different sites are not added
up; the ratio of two candidates at one site is what can be told, and the median of such ratios.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol, runtime_checkable

from mxtorq.reports.schema import Results, Row, groups

MEASURED_AGAINST = ("identity", "wush")
"""Candidates that gains are told over: nothing at all, and the best block transform published."""


@runtime_checkable
class Entry(Protocol):
    """What is needed of an entry of a manifest."""

    @property
    def site(self) -> str: ...

    @property
    def choice(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class Times:
    """How many times as much as the candidate that was taken another one loses."""

    value: float
    exact: bool
    """False: at least so many times."""

    def __str__(self) -> str:
        return f"{self._sign}{self.value:.2f} x"

    @property
    def more(self) -> str:
        """The same as a part that is lost on top; negative where a price was paid on purpose."""
        return f"{self._sign}{100 * (self.value - 1):+.2f} %"

    @property
    def _sign(self) -> str:
        return "" if self.exact else ">= "


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why a site has the candidate that it has."""

    site: str
    candidate: str
    loss: float
    others: dict[str, Times]
    """All other candidates that the site could have."""

    @property
    def runner_up(self) -> str | None:
        """The other that loses least as far as is known; None where nothing else was possible."""
        return min(
            self.others,
            key=lambda name: (self.others[name].value, not self.others[name].exact),
            default=None,
        )

    def against(self, name: str) -> Times | None:
        """What a candidate would have lost; None where it was none of this site's."""
        return Times(1.0, exact=True) if name == self.candidate else self.others.get(name)


def candidates_of(entries: Iterable[Entry]) -> dict[str, str]:
    """The candidate that was taken at each site where there was a choice."""
    return {each.site: each.choice["candidate"] for each in entries if each.choice is not None}


def verdicts(entries: Iterable[Entry]) -> list[Verdict]:
    """One for each site where there was a choice."""
    return [_verdict(each.site, each.choice) for each in entries if each.choice is not None]


def counts(*chosen: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """How many sites of each kind have a candidate, the most taken candidate first.

    Args:
        chosen: by site, such as ``model.layers.0.down_in``; several are of different seeds.
    """
    pairs = Counter((name, kind_of(site)) for each in chosen for site, name in each.items())
    names, kinds = (dict.fromkeys(pair[at] for pair in pairs) for at in (0, 1))
    found = {name: {kind: pairs[name, kind] for kind in kinds} for name in names}
    return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))


def brief(*chosen: Mapping[str, str]) -> str:
    """``layer-128 at 40 of 96 sites, wush at 3``, the most taken first; empty without choices."""
    totals = {name: sum(kinds.values()) for name, kinds in counts(*chosen).items()}
    first, *rest = [f"{name} at {total:,}" for name, total in totals.items()] or [""]
    whole = sum(totals.values())
    sites = "site" if whole == 1 else "sites"
    return ", ".join([f"{first} of {whole:,} {sites}", *rest]) if totals else ""


def kind_of(site: str) -> str:
    """``down_in`` of ``model.layers.0.down_in``."""
    return site.rpartition(".")[2]


def median_times(found: Iterable[Verdict], name: str) -> Times | None:
    """What a candidate loses at the median site of those that could have it.

    Where bounds are among the figures, the median is one too.
    """
    known = [times for each in found if (times := each.against(name)) is not None]
    if not known:
        return None
    return Times(median(each.value for each in known), exact=all(each.exact for each in known))


def chosen_groups(results: Results) -> Iterator[list[Row]]:
    """Rows that differ in their seed only, of methods that choose.

    Without those of records in which choices were not kept.
    """
    found = ([row for row in rows if row.choices] for rows in groups(results))
    yield from filter(None, found)


def choice_notes(results: Results) -> list[str]:
    """A line for each method that chooses: which candidates it took, over all its seeds."""
    return [
        f"Chosen by {_named(rows)}: {brief(*of_rows(rows))}." for rows in chosen_groups(results)
    ]


def of_rows(rows: Iterable[Row]) -> list[dict[str, str]]:
    """The choices of some rows."""
    return [row.choices for row in rows]


def _named(rows: list[Row]) -> str:
    row = rows[0]
    seeds = f"{len(rows)} seeds" if len(rows) > 1 else None
    rule = row.rules and f"scale rule {row.rules}"
    outliers = row.outliers and f"outliers {row.outliers}"
    return ", ".join(filter(None, (row.method, outliers, row.rounding, rule, seeds)))


def _verdict(site: str, choice: Mapping[str, Any]) -> Verdict:
    name = choice["candidate"]
    loss = float(choice["losses"][name])  # JSON has integers, too
    known = {True: choice["losses"], False: choice["at_least"]}
    others = {
        other: Times(_ratio(float(value), loss), exact=exact)
        for exact, losses in known.items()
        for other, value in losses.items()
        if other != name
    }
    return Verdict(site=site, candidate=name, loss=loss, others=others)


def _ratio(loss: float, least: float) -> float:
    if least > 0:
        return loss / least
    return math.inf if loss > 0 else 1.0
