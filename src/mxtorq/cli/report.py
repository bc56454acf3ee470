"""The verb that draws a record again, however old: it computes nothing and loads no model."""

from pathlib import Path
from typing import Annotated

import typer

from mxtorq.cli.app import app
from mxtorq.console import require_report, require_writable, speaking, write_record, write_report
from mxtorq.errors import UsageError
from mxtorq.options import Markdown, Report


@app.command(
    epilog="Examples:\n\n"
    "  mxtorq report results.json --report results.html --markdown results.md\n\n"
    "  mxtorq report my-checkpoint --report checkpoint.html"
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
) -> None:
    """Draw a record of earlier results: a page with charts, or Markdown."""
    with speaking("nothing was written"):
        from mxtorq.export.manifest import FILE
        from mxtorq.reading.documents import Refusal, read_text
        from mxtorq.reports.pages import markdown_of, read_record
        from mxtorq.reports.schema import LONGEST

        if report is None and markdown is None:
            raise UsageError(
                asked=f"a report of {record}",
                found="neither --report nor --markdown",
                why="nobody said where to write it",
                todo="pass --report PATH.html, --markdown PATH.md, or both",
            )
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
        if markdown is not None:
            write_record(markdown, markdown_of(read))
        write_report(report, read)
