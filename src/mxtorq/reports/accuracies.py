"""Accuracies on tasks as tables, for a terminal and for Markdown, from the record alone.

A line a task, a column a model, and under them the averages that papers publish. What stands
after ± is the harness' standard error, over documents: it says how far another sample of questions
could be from this one, and nothing of seeds.
"""

from rich.markup import escape
from rich.table import Table

from mxtorq.evaluation.tasks import SUITES
from mxtorq.reports.schema import Results, Row

_COLUMNS = ("task", "metric", "examples", "documents")


def accuracy_tables(results: Results) -> list[Table]:
    """The table of a record for a terminal; none where nothing was asked."""
    rows = _asked(results)
    if not rows:
        return []
    table = Table(
        title="Accuracy on tasks, in percent",
        title_justify="left",
        caption=escape("\n".join(_notes(results))),
        caption_justify="left",
    )
    for name in _COLUMNS[:2]:
        table.add_column(name, no_wrap=True)
    for name in (*_COLUMNS[2:], *(_name(row) for row in rows)):
        table.add_column(escape(name), justify="right", no_wrap=True)
    for line in _task_lines(rows):
        table.add_row(*map(escape, line))
    table.add_section()
    for line in _average_lines(rows):
        table.add_row(*map(escape, line), style="bold")
    return [table]


def accuracies_markdown(results: Results) -> list[str]:
    """The same in Markdown."""
    rows = _asked(results)
    if not rows:
        return []
    head = [*_COLUMNS, *(_name(row) for row in rows)]
    rule = ["---"] * 2 + ["---:"] * (len(head) - 2)
    averages = [[f"**{cell}**" if cell else "" for cell in line] for line in _average_lines(rows)]
    lines = [head, rule, *_task_lines(rows), *averages]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return ["**Accuracy on tasks, in percent**", table, "\n\n".join(_notes(results))]


def _asked(results: Results) -> list[Row]:
    return [row for row in results.rows if row.tasks]


def _name(row: Row) -> str:
    return " ".join(part for part in (row.method, row.rounding, row.outliers) if part)


def _task_lines(rows: list[Row]) -> list[list[str]]:
    lines = []
    for label in dict.fromkeys(label for row in rows for label in row.tasks):
        found = [row.tasks.get(label) for row in rows]
        first = next(result for result in found if result)
        lines.append(
            [
                label.partition(":")[0],
                first["metric"],
                str(first["shots"]),
                f"{first['documents']:,}",
                *("-" if result is None else _figure(result) for result in found),
            ]
        )
    return lines


def _average_lines(rows: list[Row]) -> list[list[str]]:
    return [
        [suite, "mean of", "", f"{len(SUITES[suite])} tasks"]
        + [f"{100 * row.averages[suite]:.2f}" if suite in row.averages else "-" for row in rows]
        for suite in SUITES
        if any(suite in row.averages for row in rows)
    ]


def _figure(result: dict[str, object]) -> str:
    value, stderr = result["value"], result["stderr"]
    shown = f"{100 * float(str(value)):.2f}"
    return shown if stderr is None else f"{shown} ± {100 * float(str(stderr)):.2f}"


def _notes(results: Results) -> list[str]:
    rows = _asked(results)
    harness = results.versions.get("lm_eval", "of an unknown version")
    notes = [f"By lm-evaluation-harness {harness}. ±: standard error over documents."]
    for suite in SUITES:
        if any(suite in row.averages for row in rows):
            members = ", ".join(asked.label for asked in SUITES[suite])
            notes.append(f"{suite}: plain mean of {members}.")
    for row in rows:
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
