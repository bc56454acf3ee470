"""The sections of a page that say which candidates a method took, where, and by how much.

Of a checkpoint everything is known: what each candidate loses at each site. Of rows of a comparison
the names are, and how often each was taken is shown.
"""

from collections.abc import Mapping

from mxtorq.export.manifest import Manifest
from mxtorq.reports.blocks import Block, Chart, Charts, Facts, Fold, Grid, Note, Section, Tiles
from mxtorq.reports.choices import (
    MEASURED_AGAINST,
    Times,
    Verdict,
    brief,
    candidates_of,
    chosen_groups,
    counts,
    median_times,
    of_rows,
    verdicts,
)
from mxtorq.reports.pages.lines import profile_of
from mxtorq.reports.pages.sites import by_kind
from mxtorq.reports.schema import Results

TITLE = "What was chosen"


def manifest_choices(manifest: Manifest) -> tuple[Section, ...]:
    """The section of a checkpoint; none where its method does not choose."""
    chosen, found = candidates_of(manifest.sites), verdicts(manifest.sites)
    if not found:
        return ()
    columns, lines = _matrix(counts(chosen))
    gains = {name: median_times(found, name) for name in MEASURED_AGAINST}
    pairs = [("taken", brief(chosen))]
    pairs += [
        (f"{name} in its place", f"{times} the loss at the median site")
        for name, times in gains.items()
        if times is not None
    ]
    return (
        Section(
            title=TITLE,
            blocks=(
                Note(
                    "Candidates were fitted to one part of the calibration text at every site and "
                    "compared on another. That with the least loss was taken, or, if the recipe "
                    "has a margin, one within it that engines run by themselves. Loss: the mean "
                    "square of what rounding inputs and weights does there, as a part of what the "
                    "inputs do. A candidate that lost more by its inputs alone than another by "
                    "both was given up: it loses at least (>=) that much. Runner-up: the nearest "
                    "of the others, as far as that is known."
                ),
                Facts(tuple(pairs)),
                Grid(title="Sites by candidate and kind", columns=columns, lines=lines),
                Charts(title="Where", charts=(chosen_chart(chosen),)),
                Fold(title=f"Why: losses at all {len(found)} sites", blocks=(_every_site(found),)),
            ),
        ),
    )


def results_choices(results: Results) -> tuple[Section, ...]:
    """The section of a record of results; none where no row is of a method that chooses."""
    grids: list[Block] = []
    for rows in chosen_groups(results):
        row = rows[0]
        columns, lines = _matrix(counts(*of_rows(rows)))
        seeds = f", {len(rows)} seeds" if len(rows) > 1 else ""
        how = f"{row.method}, {row.rounding}, scale rule {row.rules}{seeds}"
        title = f"{profile_of(row)}. {how}: sites by candidate and kind"
        grids.append(Grid(title=title, columns=columns, lines=lines))
    return (Section(title=TITLE, blocks=tuple(grids)),) if grids else ()


def chosen_chart(chosen: Mapping[str, str]) -> Chart:
    """Which candidate each site has."""
    kinds = by_kind(chosen)
    layers = dict.fromkeys(layer for found in kinds.values() for layer in found)
    return Chart(
        title="The candidate of every site",
        description="A line for each layer and a column for each kind of site, coloured by the "
        f"candidate that was taken: {brief(chosen)}.",
        drawing=Tiles(
            lines=tuple(
                (layer, tuple(found.get(layer, "") for found in kinds.values())) for layer in layers
            ),
            columns=tuple(kinds),
            names=tuple(counts(chosen)),
            axis="layer",
        ),
    )


def _matrix(
    found: Mapping[str, Mapping[str, int]],
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Headings, and a line a candidate: how many sites of each kind have it."""
    kinds = next(iter(found.values()))
    lines = [
        (name, str(sum(of.values())), *(str(count) if count else "-" for count in of.values()))
        for name, of in found.items()
    ]
    return ("candidate", "all", *kinds), tuple(lines)


def _every_site(found: list[Verdict]) -> Grid:
    against = [name for name in MEASURED_AGAINST if any(each.against(name) for each in found)]
    return Grid(
        title="Every site, and what other candidates would lose there",
        columns=(
            *("site", "candidate", "loss", "runner-up", "loses more"),
            *(f"{name} loses" for name in against),
        ),
        lines=tuple(_site(each, against) for each in found),
    )


def _site(verdict: Verdict, against: list[str]) -> tuple[str, ...]:
    second = verdict.runner_up
    return (
        verdict.site,
        verdict.candidate,
        f"{verdict.loss:.3e}",
        second or "-",
        verdict.others[second].more if second is not None else "-",
        *(_shown(verdict.against(name)) for name in against),
    )


def _shown(times: Times | None) -> str:
    return "-" if times is None else str(times)
