"""A diagnosis as tables for a terminal, from the record alone."""

from rich.markup import escape
from rich.table import Table

from mxtorq.reports.findings import Diagnosis, Status

_COLOURS = {
    Status.OK: "green",
    Status.NOTE: "yellow",
    Status.WRONG: "bold red",
    Status.SKIPPED: "dim",
    "W4A4": "green",
    "W4A16": "yellow",
    "refused": "dim",
    "WRONG": "bold red",
}


def diagnosis_tables(diagnosis: Diagnosis) -> list[Table]:
    """What the checks found, and what each engine makes of the checkpoint."""
    checks = Table(title=f"{escape(diagnosis.checkpoint)}: {escape(diagnosis.layout)}")
    for column in ("check", "result", "found"):
        checks.add_column(column, no_wrap=column != "found")
    for finding in diagnosis.findings:
        checks.add_row(finding.check, _coloured(finding.status), escape(finding.text))
    engines = Table(title="What engines make of it")
    for column in ("engine", "runs as", "because"):
        engines.add_column(column, no_wrap=column != "because")
    for verdict in diagnosis.engines:
        engines.add_row(verdict.engine, _coloured(verdict.runs_as), escape(verdict.why))
    return [checks, engines]


def _coloured(text: str) -> str:
    return f"[{_COLOURS[text]}]{text}[/]"
