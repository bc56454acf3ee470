"""What the command line says and how: errors, bars, tables. Knows the records, not the pipeline."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mxtorq.errors import MxtorqError, OutputError, UsageError
from mxtorq.export.manifest import Manifest
from mxtorq.reading.documents import Refusal, read_text
from mxtorq.reports.render import checkpoint_facts, checkpoint_sites, markdown, terminal
from mxtorq.reports.schema import LONGEST, Results

OUT = Console()
_ERR = Console(stderr=True)
_PAGE = 300
"""Columns of a table that goes into a file: fewer would cut figures."""
_LOG_SECONDS = 30


@contextmanager
def speaking(after_interrupt: str) -> Iterator[None]:
    """Turn our errors and Ctrl-C into a message and an exit code."""
    try:
        yield
    except MxtorqError as error:
        _ERR.print(f"[bold red]{type(error).__name__}[/bold red]")
        for label, part in (
            ("asked", error.asked),
            ("found", error.found),
            ("why", error.why),
            ("to do", error.todo),
        ):
            _ERR.print(f"  [bold]{label + ':':7}[/bold]{escape(part)}", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _ERR.print(f"\n[bold red]Interrupted[/bold red]: {escape(after_interrupt)}.")
        raise typer.Exit(130) from None


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """How far each stage is and how long it will take, on standard error.

    Bars on a terminal; in a log, a line when a stage ends and every half a minute.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # its own bars would break ours
    if not _ERR.is_terminal:
        yield _log_lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_ERR, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def callback(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done == 0:
                tasks[stage] = bars.add_task(escape(stage), total=total)
            bars.update(tasks[stage], completed=done, total=total, visible=done < total)

        yield callback


def _log_lines() -> Callable[[str, int, int], None]:
    started: dict[str, float] = {}
    spoken: dict[str, float] = {}

    def callback(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0 or stage not in started:
            started[stage] = spoken[stage] = now
        if done == total or now - spoken[stage] >= _LOG_SECONDS:
            spent = now - started[stage]
            left = f", about {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
            _ERR.print(f"{escape(stage)}: {done}/{total} in {spent:.0f} s{left}", soft_wrap=True)
            spoken[stage] = now

    return callback


def require_writable(path: Path | None) -> None:
    """Refuse a path for records before hours of work instead of after them."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise UsageError(
            asked=f"the record {path}",
            found="a folder, or a folder that does not exist or is not yours to write to",
            why="the results could not be written there in the end",
            todo="name a file in an existing folder",
        )


def resumed(path: Path | None, resume: bool) -> Results | None:
    """The earlier record that a comparison goes on with, if any.

    Raises:
        UsageError: there is one and nobody said --resume, or there is no --json to go on with.
    """
    require_writable(path)
    if path is None or not path.exists():
        if resume and path is None:
            raise UsageError(
                asked="--resume",
                found="no --json",
                why="the finished rows stand in the record that --json names",
                todo="pass --json PATH",
            )
        return None
    if not resume:
        raise UsageError(
            asked=f"--json {path}",
            found="a file of that name",
            why="its rows may have taken hours and would be overwritten",
            todo="name another file, or go on with that record: `mxtorq compare --resume`",
        )
    refuse = Refusal(
        kind=UsageError,
        asked=f"to go on with the record {path}",
        why="it cannot be read as a record of `mxtorq compare`",
        todo="name the file that --json wrote, or another one to start with",
    )
    return Results.from_json(read_text(path, LONGEST, refuse))


def keep_record(path: Path | None, results: Results, done: Results | None) -> None:
    """Write the rows that are finished so far. Raises `OutputError`."""
    if path is not None:
        _write(path, signed(results, done).to_json())


def write_record(path: Path | None, text: str) -> None:
    """Write a record where it was asked for, whole or not at all. Raises `OutputError`."""
    if path is not None:
        _write(path, text)
        OUT.print(f"Record written to {escape(str(path))}")


def report_results(
    results: Results, json_path: Path | None, title: str, markdown_path: Path | None = None
) -> None:
    """Print a table of results and write the records where they were asked for."""
    wide, width = (OUT, OUT.width) if OUT.is_terminal else (Console(width=_PAGE), None)
    wide.print(terminal(results, escape(title), width))
    write_record(json_path, results.to_json())
    write_record(markdown_path, markdown(results))


def signed(results: Results, done: Results | None = None) -> Results:
    """Results with the command line behind them, after those of the record that they go on with."""
    command = shlex.join(["mxtorq", *sys.argv[1:]])
    earlier = done.command.splitlines() if done is not None else []
    return replace(results, command="\n".join(dict.fromkeys([*earlier, command])))


def _write(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise OutputError(
            asked=f"the record {path}",
            found=f"{type(error).__name__}: {error}",
            why="it could not be written in full",
            todo="free space on that disk or name another place; an earlier version is unharmed",
        ) from error


def report_written(path: Path, manifest: Manifest) -> None:
    """Say what was written and that it was read back."""
    OUT.print(checkpoint_facts(manifest, str(path)))
    OUT.print("Read back from disk: it computes what the model in memory computes, bit for bit.")


def report_contents(path: Path, manifest: Manifest) -> None:
    """Say what a checkpoint is, site by site."""
    OUT.print(checkpoint_facts(manifest, str(path)))
    wide = OUT if OUT.is_terminal else Console(width=_PAGE)
    wide.print(checkpoint_sites(manifest))


def report_exported(path: Path, linears: int, notes: Sequence[str]) -> None:
    """Say what was exported, and what to know of it."""
    OUT.print(f"Written to {escape(str(path))}: {linears} quantized linears.")
    OUT.print("Read back from disk and compared, bit for bit.")
    for note in notes:
        OUT.print(escape(note), soft_wrap=True)
