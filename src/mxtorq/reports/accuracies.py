"""Accuracies on tasks as tables, for a terminal and for Markdown, from the record alone.

Of one or two models a line a task and a column a model; of more, a line a method and a column a
task, as in the table of perplexities above it, all seeds of a method in one line. Averages are
those that papers publish. What stands after ± is the harness' standard error, over documents: it
says how far another sample of questions could be from this one, and nothing of seeds. Several seeds
have their standard deviation there instead. The error of an average takes its tasks for
independent: the root of the sum of their squares, over their number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from rich.markup import escape
from rich.table import Table

from mxtorq.evaluation.tasks import SUITES
from mxtorq.reports.schema import Results, Row, groups

_COLUMNS = ("task", "metric", "examples", "documents")
_HEADS = ("method", "outliers", "rounding", "scale rule")
_TITLE = "Accuracy on tasks, in percent"
_FEW = 2
"""Models that stand side by side."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A figure of one method in percent, over its seeds."""

    values: tuple[float, ...]
    """One a seed."""
    error: float | None
    """What stands after ±."""

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    def __str__(self) -> str:
        shown = f"{self.mean:.2f}"
        return shown if self.error is None else f"{shown} ± {self.error:.2f}"


def accuracy_tables(results: Results) -> list[Table]:
    """The table of a record for a terminal; none where nothing was asked."""
    if not asked_groups(results):
        return []
    table = Table(
        title=_TITLE,
        title_justify="left",
        caption=escape("\n".join(accuracy_notes(results))),
        caption_justify="left",
    )
    header, lines, averages = _oriented(results)
    texts = 2 if header[0] == "task" else len(_HEADS)
    for at, name in enumerate(header):
        side = "left" if at < texts else "right"
        table.add_column(escape(name), justify=side, overflow="fold")  # type: ignore[arg-type]
    for line in lines:
        table.add_row(*map(escape, line))
    if averages:
        table.add_section()
    for line in averages:
        table.add_row(*map(escape, line), style="bold")
    return [table]


def accuracies_markdown(results: Results) -> list[str]:
    """The same in Markdown."""
    if not asked_groups(results):
        return []
    header, lines, averages = _oriented(results)
    texts = 2 if header[0] == "task" else len(_HEADS)
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    strong = [[f"**{cell}**" if cell else "" for cell in line] for line in averages]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines, *strong))
    return [f"**{_TITLE}**", table, "\n\n".join(accuracy_notes(results))]


def asked_groups(results: Results) -> list[list[Row]]:
    """Rows that differ in their seed only, of those that were asked something."""
    rows = tuple(row for row in results.rows if row.tasks)
    return groups(Results(rows=rows, versions={}))


def task_labels(found: Sequence[Sequence[Row]]) -> list[str]:
    """All tasks of some groups, in the order in which they were asked."""
    return list(dict.fromkeys(label for group in found for row in group for label in row.tasks))


def suite_names(found: Sequence[Sequence[Row]]) -> list[str]:
    """The averages that any of some groups has."""
    return [suite for suite in SUITES if any(suite in row.averages for g in found for row in g)]


def task_accuracy(group: Sequence[Row], label: str) -> Accuracy | None:
    """The figure of a task; None where none of the seeds was asked."""
    results = [row.tasks[label] for row in group if label in row.tasks]
    errors = [result["stderr"] for result in results]
    return _accuracy([result["value"] for result in results], errors[0] if errors else None)


def average_accuracy(group: Sequence[Row], suite: str) -> Accuracy | None:
    """A paper's average; None where not all of its tasks were asked."""
    rows = [row for row in group if suite in row.averages]
    error = None
    if len(rows) == 1:
        labels = [asked.label for asked in SUITES[suite]]
        errors = [rows[0].tasks[each]["stderr"] for each in labels if each in rows[0].tasks]
        if len(errors) == len(labels) and None not in errors:
            error = math.hypot(*errors) / len(errors)
    return _accuracy([row.averages[suite] for row in rows], error)


def accuracy_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line a method: averages first, then its tasks."""
    found = asked_groups(results)
    suites, labels = suite_names(found), task_labels(found)
    lines = []
    for group in found:
        row = group[0]
        name = row.method if len(group) == 1 else f"{row.method} ({len(group)} seeds)"
        figures = [
            *(average_accuracy(group, suite) for suite in suites),
            *(task_accuracy(group, label) for label in labels),
        ]
        heads = [name, row.outliers or "none", row.rounding or "-", row.rules or "-"]
        lines.append([*heads, *("-" if each is None else str(each) for each in figures)])
    return [*_HEADS, *suites, *labels], lines


def accuracy_notes(results: Results) -> list[str]:
    """What a reader must know of them."""
    found = asked_groups(results)
    harness = results.versions.get("lm_eval", "of an unknown version")
    notes = [f"By lm-evaluation-harness {harness}. ±: standard error over documents."]
    if suite_names(found):
        notes[0] += " Of a mean: as if its tasks were independent."
    if any(len(group) > 1 for group in found):
        notes[0] += " Of several seeds: the mean, and their standard deviation."
    for suite in suite_names(found):
        members = ", ".join(asked.label for asked in SUITES[suite])
        notes.append(f"{suite}: plain mean of {members}.")
    if len(found) > _FEW:
        notes.append(f"Metrics: {_metrics(found)}.")
    for row in (row for group in found for row in group):
        plan = row.provenance.get("tasks") or {}
        if plan.get("limit") is not None:
            notes.append(
                f"The first {plan['limit']} documents of each task alone: a trial, no measurement."
            )
        engine = plan.get("engine", "torch")
        if engine != "torch":
            release = results.versions.get(engine, "of an unknown version")
            notes.append(f"{_name(row)} was asked through {engine} {release}.")
        cut = {label: each["truncated"] for label, each in row.tasks.items() if each["truncated"]}
        for label, count in cut.items():
            notes.append(
                f"{label}: {count:,} prompts were longer than the model's window and lost their "
                "beginning."
            )
    return list(dict.fromkeys(notes))


def _oriented(results: Results) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Headings, lines, and lines of averages, whichever way round they are read best."""
    found = asked_groups(results)
    if len(found) > _FEW:
        header, lines = accuracy_cells(results)
        return header, lines, []
    lines = []
    for label in task_labels(found):
        results_of = [row.tasks[label] for group in found for row in group if label in row.tasks]
        first = results_of[0]
        figures = [task_accuracy(group, label) for group in found]
        told = [label.partition(":")[0], first["metric"], str(first["shots"])]
        lines.append([*told, f"{first['documents']:,}", *_shown(figures)])
    averages = []
    for suite in suite_names(found):
        figures = [average_accuracy(group, suite) for group in found]
        averages.append([suite, "mean of", "", f"{len(SUITES[suite])} tasks", *_shown(figures)])
    return [*_COLUMNS, *(_name(group[0]) for group in found)], lines, averages


def _shown(figures: Sequence[Accuracy | None]) -> list[str]:
    return ["-" if each is None else str(each) for each in figures]


def _accuracy(shares: Sequence[float], error: float | None) -> Accuracy | None:
    if not shares:
        return None
    values = tuple(100 * float(share) for share in shares)
    if len(values) > 1:
        return Accuracy(values=values, error=stdev(values))
    return Accuracy(values=values, error=None if error is None else 100 * float(error))


def _name(row: Row) -> str:
    return " ".join(part for part in (row.method, row.rounding, row.outliers) if part)


def _metrics(found: Sequence[Sequence[Row]]) -> str:
    """What stands for each task, and over how many documents."""
    told = {}
    for label in task_labels(found):
        first = next(row.tasks[label] for group in found for row in group if label in row.tasks)
        told[label] = f"{label} {first['metric']} ({first['documents']:,} documents)"
    return ", ".join(told.values())
