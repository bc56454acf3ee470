"""Accuracies on tasks: charts of averages and tasks against BF16, and the table of all.

A chart a task, outlier profile and scale rule, best first, with what the choice of questions leaves
open: 95 % intervals, 1.96 standard errors to each side. They are of one model's accuracy. The same
questions were asked of all, so the difference of two models is known better than their intervals
say where they overlap; how much better no record says, which holds no single answers.
"""

from collections.abc import Callable, Sequence

from mxtorq.reports.accuracies import (
    Accuracy,
    accuracy_cells,
    accuracy_notes,
    asked_groups,
    average_accuracy,
    suite_names,
    task_accuracy,
    task_labels,
)
from mxtorq.reports.blocks import Block, Chart, Charts, Dot, Dots, Fold, Grid, Note, Section
from mxtorq.reports.pages.lines import Line, panels, roundings
from mxtorq.reports.schema import Results, Row

_NORMAL = 1.96
"""Standard errors to each side of a normal distribution's 95 %."""

_Figure = Callable[[Sequence[Row], str], Accuracy | None]
_Shown = tuple[Line, Accuracy]


def accuracy_sections(results: Results, lines: list[Line]) -> tuple[Section, ...]:
    """The section of a page; none where nothing was asked.

    Args:
        results: the record.
        lines: of its methods.
    """
    found = asked_groups(results)
    if not found:
        return ()
    header, cells = accuracy_cells(results)
    table = Grid(
        title="Accuracy in percent",
        columns=tuple(header),
        lines=tuple(map(tuple, cells)),
        strong=frozenset(at for at, group in enumerate(found) if group[0].rounding is None),
    )
    blocks: list[Block] = [Note(text) for text in accuracy_notes(results)]
    bases = {group[0].outliers: group for group in found if group[0].rounding is None}
    averages = _charts(suite_names(found), average_accuracy, lines, bases)
    tasks = _charts(task_labels(found), task_accuracy, lines, bases)
    if averages or tasks:
        blocks.append(
            Note(
                "Right is better; the line is BF16 and the band around it its interval. A line "
                "through a mark is a 95 % interval over documents (1.96 standard errors); of "
                "several seeds, strokes are single seeds. Charts of one task and outlier profile "
                "have the same limits."
            )
        )
    blocks += averages
    if averages and tasks:
        blocks.append(Fold(title="Task by task", blocks=tuple(tasks)))
    else:
        blocks += tasks
    return (Section(title="Accuracy on tasks", blocks=(*blocks, table)),)


def _charts(
    names: list[str],
    figure: _Figure,
    lines: list[Line],
    bases: dict[str | None, list[Row]],
) -> list[Block]:
    """A chart a profile, rule and name, grouped by profile; a name's share their limits."""
    found: dict[tuple[str, str], list[tuple[str, list[_Shown]]]] = {}
    for profile, rule, panel in panels(lines):
        for name in names:
            known = [(line, figure(line.rows, name)) for line in panel]
            shown = [(line, each) for line, each in known if each is not None]
            if shown:
                found.setdefault((profile, name), []).append((rule, shown))
    charts: dict[str, list[Chart]] = {}
    for (profile, name), of_rules in found.items():
        first = of_rules[0][1][0][0].first
        base = figure(bases.get(first.outliers, []), name)
        every = [each for _, shown in of_rules for _, each in shown] + ([base] if base else [])
        places = [place for each in every for place in (*each.values, *(_interval(each) or ()))]
        limits = min(places), max(places)
        for rule, shown in of_rules:
            drawing = _drawing(name, shown, base, roundings(lines), limits)
            chart = Chart(
                title=f"{name}. {rule}",
                description=_description(profile, shown, base),
                drawing=drawing,
            )
            charts.setdefault(profile, []).append(chart)
    return [Charts(title=title, charts=tuple(some)) for title, some in charts.items()]


def _drawing(
    name: str,
    shown: list[_Shown],
    base: Accuracy | None,
    series: tuple[str, ...],
    limits: tuple[float, float],
) -> Dots:
    return Dots(
        dots=tuple(
            Dot(
                label=line.first.method,
                series=line.rounding,
                values=each.values,
                mean=each.mean,
                shown=f"{each.mean:.2f}",
                interval=_interval(each),
            )
            for line, each in _ordered(shown)
        ),
        series=series,
        axis=f"{name}, %",
        zero="BF16",
        bounds=limits,
        bend=None,
        apart=not shown[0][0].first.ocp,
        origin=None if base is None else base.mean,
        band=None if base is None else _interval(base),
    )


def _description(profile: str, shown: list[_Shown], base: Accuracy | None) -> str:
    told = [f"{each} % ({line.first.method}, {line.rounding})" for line, each in _ordered(shown)]
    beside = "" if base is None else f" BF16: {base} %."
    return (
        f"{profile}. Dot plot of {len(told)} methods and roundings, best first: from {told[0]} to "
        f"{told[-1]}.{beside}"
    )


def _ordered(shown: list[_Shown]) -> list[_Shown]:
    return sorted(shown, key=lambda pair: -pair[1].mean)


def _interval(accuracy: Accuracy) -> tuple[float, float] | None:
    """Inside of what is possible; None of several seeds, whose error is another one."""
    if accuracy.error is None or len(accuracy.values) > 1:
        return None
    half = _NORMAL * accuracy.error
    return max(0.0, accuracy.mean - half), min(100.0, accuracy.mean + half)
