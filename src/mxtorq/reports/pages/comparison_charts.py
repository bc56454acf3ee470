"""Charts of a record of `compare`: losses, where they arise, and what they cost.

Charts of one outlier profile share their limits, so that scale rules can be compared across them.
"""

import math
from collections.abc import Mapping

from mxtorq.reports.blocks import (
    Block,
    Chart,
    Charts,
    Dot,
    Dots,
    Heat,
    Note,
    Scatter,
    Spot,
    bend_of,
)
from mxtorq.reports.pages.lines import Line, panels, percent, roundings, told
from mxtorq.reports.pages.sites import by_kind, decibels
from mxtorq.reports.render import mean_site_errors
from mxtorq.reports.schema import sqnr_db

_FAR = 1e4
"""Percent beyond which the end of an interval gets no room of its own and is cut at the edge."""


def loss_charts(lines: list[Line]) -> tuple[Block, ...]:
    """What each method loses, a chart a profile and rule."""
    several = any(len(line.losses) > 1 for line in lines)
    note = (
        "Perplexity over that of BF16, minus one. Left is better; the line at zero is BF16. Charts "
        "of one outlier profile have the same limits."
    )
    if several:
        note += " A mark is the mean of all seeds, the strokes beside it are single seeds."
    if any(line.interval for line in lines):
        note += " A line through a mark is the 95 % interval of its loss, paired over windows."
    bounds: dict[str | None, list[float]] = {}
    for line in lines:
        finite = [loss for loss in line.losses if math.isfinite(loss)]
        finite += [end for end in line.interval or () if abs(end) < _FAR]
        bounds.setdefault(line.first.outliers, [0.0]).extend(finite)
    charts: dict[str, list[Chart]] = {}
    for profile, rule, panel in panels(lines):
        all_losses = bounds[panel[0].first.outliers]
        best, worst = panel[0], panel[-1]
        charts.setdefault(profile, []).append(
            Chart(
                title=rule,
                description=f"{profile}. Dot plot of {len(panel)} methods and roundings, "
                f"least loss first: from {told(best)} to {told(worst)}.",
                drawing=Dots(
                    dots=tuple(
                        Dot(
                            label=line.first.method,
                            series=line.rounding,
                            values=line.losses,
                            mean=line.mean,
                            shown=percent(line.mean),
                            interval=line.interval,
                        )
                        for line in panel
                    ),
                    series=roundings(lines),
                    axis="perplexity over BF16, %",
                    zero="BF16",
                    bounds=(min(all_losses), max(all_losses)),
                    bend=bend_of(all_losses),
                    apart=not panel[0].first.ocp,
                ),
            )
        )
    return Note(note), *_grouped(charts)


def place_charts(lines: list[Line]) -> tuple[Block, ...]:
    """Where each method loses it, site by site, a chart a profile and rule."""
    lines = [line for line in lines if line.first.site_errors]
    errors = {id(line): mean_site_errors(line.rows) for line in lines}
    bounds = decibels(error for each in errors.values() for error in each.values())
    charts: dict[str, list[Chart]] = {}
    for profile, rule, panel in panels(lines):
        table = {id(line): by_kind(errors[id(line)]) for line in panel}
        kinds = tuple(dict.fromkeys(kind for each in table.values() for kind in each))
        layers = tuple(
            dict.fromkeys(layer for each in table.values() for of in each.values() for layer in of)
        )
        ordered = [line for name in roundings(panel) for line in panel if line.rounding == name]
        worst = max(
            (error, site, line.first.method)
            for line in panel
            for site, error in errors[id(line)].items()
        )
        charts.setdefault(profile, []).append(
            Chart(
                title=rule,
                description=f"{profile}. Heat map of {len(panel)} methods and roundings over "
                f"{len(kinds)} kinds of site and {len(layers)} layers. The lowest SQNR is "
                f"{sqnr_db(worst[0]):.2f} dB, of {worst[2]} at {worst[1]}.",
                drawing=Heat(
                    lines=tuple(
                        (
                            line.rounding,
                            line.first.method,
                            tuple(
                                tuple(
                                    _decibels(table[id(line)].get(kind, {}).get(layer))
                                    for layer in layers
                                )
                                for kind in kinds
                            ),
                        )
                        for line in ordered
                    ),
                    kinds=kinds,
                    layers=layers,
                    bounds=bounds,
                ),
            )
        )
    return _grouped(charts)


def _grouped(charts: Mapping[str, list[Chart]]) -> tuple[Charts, ...]:
    return tuple(Charts(title=title, charts=tuple(some)) for title, some in charts.items())


def _decibels(error: float | None) -> float | None:
    return None if error is None or math.isnan(error) else sqnr_db(error)


def cost_charts(lines: list[Line]) -> tuple[Block, ...]:
    """Loss against what transforms multiply online, and against the time of the search.

    Only scales of the format: the others have no run time.
    """
    charts: dict[str, list[Chart]] = {}
    for profile, rule, panel in panels([line for line in lines if line.first.ocp]):
        for name, axis, spots in (
            ("run-time cost", "multiply-adds a token", _spots(panel, "multiply_adds_per_token")),
            ("search time", "search, seconds", _spots(panel, "search_seconds")),
        ):
            if len({spot.label for spot in spots}) < _FEWEST or not any(spot.x for spot in spots):
                continue
            charts.setdefault(profile, []).append(
                Chart(
                    title=f"{rule}: loss against {name}",
                    description=f"{profile}. Scatter plot of {len(spots)} methods and "
                    "roundings; those that nothing else beats in both are numbered.",
                    drawing=Scatter(
                        spots=spots,
                        series=roundings(lines),
                        x_axis=axis,
                        y_axis="perplexity over BF16, %",
                        zero="BF16",
                        x_bend=bend_of(spot.x for spot in spots),
                        y_bend=bend_of(spot.y for spot in spots),
                    ),
                )
            )
    if not charts:
        return ()
    note = (
        "Best is the lower left. Multiply-adds are those of the transforms alone, all sites "
        "together; seconds belong to the machine that ran the comparison. Means of all seeds."
    )
    return Note(note), *_grouped(charts)


_FEWEST = 5
"""Methods that are worth a cloud of points."""


def _spots(lines: list[Line], what: str) -> tuple[Spot, ...]:
    spots = []
    for line in lines:
        costs = [float(cost) for row in line.rows if (cost := getattr(row, what)) is not None]
        if costs and math.isfinite(line.mean):
            mean = sum(costs) / len(costs)
            spots.append(Spot(label=line.first.method, series=line.rounding, x=mean, y=line.mean))
    return tuple(spots)
