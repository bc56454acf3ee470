"""The verb that draws a record again, however old: it computes nothing and loads no model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mxtorq.cli.app import app
from mxtorq.console import (
    report_against,
    report_contents,
    report_inspection,
    report_results,
    require_report,
    require_writable,
    speaking,
    write_record,
    write_report,
)
from mxtorq.errors import UsageError
from mxtorq.options import Against, Markdown, Report

if TYPE_CHECKING:
    from mxtorq.reports.pages import Record


@app.command(
    epilog="Examples:\n\n"
    "  mxtorq report results.json\n\n"
    "  mxtorq report results.json --report results.html --markdown results.md\n\n"
    "  mxtorq report my-checkpoint --report checkpoint.html\n\n"
    "  mxtorq report results.json --against docs/published.toml"
)
def report(
    record: Annotated[
        Path,
        typer.Argument(
            metavar="RECORD",
            help="What --json of compare, evaluate, inspect or quantize wrote, or a checkpoint.",
        ),
    ],
    report: Report = None,
    markdown: Markdown = None,
    against: Against = None,
) -> None:
    """Draw a record of earlier results: a page with charts, Markdown, or beside published ones.

    Without options its tables are printed, as the verb printed them that wrote it.
    """
    with speaking("nothing was written"):
        from mxtorq.export.manifest import FILE
        from mxtorq.reading.documents import Refusal, read_text
        from mxtorq.reports.pages import markdown_of, read_record
        from mxtorq.reports.published import read_published
        from mxtorq.reports.schema import LONGEST, Results

        beside = None if against is None else read_published(against)
        source = record / FILE if record.is_dir() else record
        if markdown is not None and markdown.resolve() == source.resolve():
            raise UsageError(
                asked=f"--markdown {markdown}",
                found="the record itself",
                why="it would be overwritten",
                todo="name another file",
            )
        require_writable(markdown)
        require_report(report, markdown, source)
        refuse = Refusal(
            kind=UsageError,
            asked=f"a report of {record}",
            why="it cannot be read as a record",
            todo="name a file that --json wrote, or a checkpoint of mxtorq",
        )
        read = read_record(read_text(source, LONGEST, refuse), str(record))
        if beside is not None and not isinstance(read, Results):
            raise UsageError(
                asked=f"{record} beside the figures in {against}",
                found=f"a record of kind {type(read).__name__}",
                why="published figures are perplexities and accuracies",
                todo="name a record of `mxtorq compare` or `mxtorq evaluate`",
            )
        if (report, markdown, against) == (None, None, None):
            _print(read, record)
            return
        added = report_against(read, beside) if isinstance(read, Results) else ""
        if markdown is not None:
            write_record(markdown, markdown_of(read) + added)
        write_report(report, read, beside)


def _print(read: "Record", path: Path) -> None:
    """The tables of a record, on the terminal."""
    from mxtorq.export.manifest import Manifest
    from mxtorq.reports.schema import Results

    if isinstance(read, Manifest):
        report_contents(path, read)
    elif isinstance(read, Results):
        models = dict.fromkeys(str(row.provenance.get("model", path)) for row in read.rows)
        title = f"{'Perplexity of ' if read.only_evaluated else ''}{', '.join(models)}"
        report_results(read, None, title, fidelity=read.only_evaluated)
    else:
        report_inspection(read, None, None, None)
