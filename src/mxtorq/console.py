"""What the command line says and how: errors, bars, tables. Knows the records, not the pipeline."""

import os
import shlex
import signal
import sys
import threading
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
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from mxtorq.errors import MxtorqError, OutputError, UsageError
from mxtorq.export.manifest import Manifest
from mxtorq.export.output import all_layers, finished_layers, partial_folder
from mxtorq.interrupts import end_now, ending_soon
from mxtorq.reading.documents import Refusal, read_text
from mxtorq.reports import imbalance
from mxtorq.reports.accuracies import accuracy_tables
from mxtorq.reports.against import against_markdown, against_tables
from mxtorq.reports.charts import require_charts
from mxtorq.reports.contents import checkpoint_facts, checkpoint_sites
from mxtorq.reports.diagnosis import diagnosis_tables
from mxtorq.reports.findings import Diagnosis
from mxtorq.reports.html import page
from mxtorq.reports.inspection import Inspection
from mxtorq.reports.needs import Needs, duration, finished_of
from mxtorq.reports.needs import table as needs_table
from mxtorq.reports.pages import Record
from mxtorq.reports.published import Published
from mxtorq.reports.render import (
    fidelity_terminal,
    markdown,
    terminal,
)
from mxtorq.reports.schema import LONGEST, Results

OUT = Console()
_ERR = Console(stderr=True)
_PAGE = 300
"""Columns of a table that goes into a file: fewer would cut figures."""
_LOG_SECONDS = 30


@contextmanager
def speaking(after_interrupt: str | Callable[[], str]) -> Iterator[None]:
    """Turn our errors and Ctrl-C into a message and an exit code, Ctrl-C within seconds.

    Args:
        after_interrupt: what is left of the work then, or what finds that out.
    """
    once = threading.Lock()

    def farewell() -> None:
        if once.acquire(blocking=False):
            _ERR.show_cursor()  # bars that are cut short have hidden it
            text = after_interrupt if isinstance(after_interrupt, str) else after_interrupt()
            _ERR.print(f"\n[bold red]Interrupted[/bold red]: {escape(text)}.", soft_wrap=True)

    with ending_soon(farewell):
        try:
            yield
        except MxtorqError as error:
            _finish_speaking()
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
            _finish_speaking()
            farewell()  # everything that cleans up stands inside of this block
            end_now()


def what_is_left(out: Path) -> Callable[[], str]:
    """What finds out, later, what an interrupted run into ``out`` has left."""
    was_there = out.exists()
    # torchrun stops all ranks when one has ended.
    several = "WORLD_SIZE" in os.environ
    hint = ". If nobody wanted that, another rank ended: look at its message" if several else ""

    def find() -> str:
        folder, finished = partial_folder(out), finished_layers(out)
        if out.exists() and not was_there:
            return f"{out} was written and read back before that"
        if finished:
            kept = f"{finished_of(finished, all_layers(out))} and kept in {folder}"
        elif (folder / "rotations.json").exists():
            kept = f"the rotations of the whole model are kept in {folder}"
        elif folder.exists():
            return f"nothing was written to {out}; the next run into it will clear {folder}{hint}"
        else:
            return f"nothing was written to {out}{hint}"
        return f"{kept}; run the same command again to go on{hint}"

    return find


def _finish_speaking() -> None:
    """Nothing cuts the last words short: torchrun stops all ranks when it sees one end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
        _TimeLeft(),
    )
    with Progress(*columns, console=_ERR, transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        paces: dict[str, _Pace] = {}

        def callback(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done == 0:
                paces[stage] = _Pace(done)
                tasks[stage] = bars.add_task(escape(stage), total=total, pace=paces[stage])
            paces[stage].count(done, total)
            bars.update(tasks[stage], completed=done, total=total, visible=done < total)

        yield callback


class _Pace:
    """How long a stage will still take, from what was done since it was first heard of: a run that
    goes on begins with layers that somebody else has finished."""

    def __init__(self, first: int) -> None:
        self._first, self.started = first, time.monotonic()
        self._end: float | None = None

    def count(self, done: int, total: int) -> None:
        """So much is done."""
        now = time.monotonic()
        if done > self._first:
            self._end = now + (now - self.started) / (done - self._first) * (total - done)

    @property
    def left(self) -> float | None:
        """Seconds; None while nobody knows."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = task.fields["pace"].left
        shown = "" if left is None else f"{duration(left)} left"
        return Text(shown, style="progress.remaining")


def _log_lines() -> Callable[[str, int, int], None]:
    paces: dict[str, _Pace] = {}
    spoken: dict[str, float] = {}

    def callback(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0 or stage not in paces:
            paces[stage], spoken[stage] = _Pace(done), now
        pace = paces[stage]
        pace.count(done, total)
        if done == total or now - spoken[stage] >= _LOG_SECONDS:
            left = f", {duration(pace.left)} left" if done < total and pace.left else ""
            spent = f"{now - pace.started:.0f} s"
            _ERR.print(f"{escape(stage)}: {done}/{total} in {spent}{left}", soft_wrap=True)
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


def require_report(path: Path | None, *others: Path | None) -> None:
    """Refuse a report that could not be drawn, or would overwrite another file of this run."""
    require_writable(path)
    if path is None:
        return
    if path.resolve() in {other.resolve() for other in others if other is not None}:
        raise UsageError(
            asked=f"the report {path}",
            found="another file of this command under that name",
            why="one would overwrite the other",
            todo="name a file of its own, such as report.html",
        )
    require_charts()


def resumed(path: Path | None, resume: bool) -> Results | None:
    """The earlier record that a run goes on with, if any.

    Raises:
        UsageError: there is one and nobody said --resume, or there is no --json to go on with.
    """
    require_writable(path)
    if path is None or not path.exists():
        if resume and path is None:
            raise UsageError(
                asked="--resume",
                found="no --json",
                why="what is finished stands in the record that --json names",
                todo="pass --json PATH",
            )
        return None
    if not resume:
        raise UsageError(
            asked=f"--json {path}",
            found="a file of that name",
            why="its figures may have taken hours and would be overwritten",
            todo="name another file, or go on with that record: --resume",
        )
    refuse = Refusal(
        kind=UsageError,
        asked=f"to go on with the record {path}",
        why="it cannot be read as a record of `mxtorq compare` or `mxtorq evaluate`",
        todo="name the file that --json wrote, or another one to start with",
    )
    return Results.from_json(read_text(path, LONGEST, refuse), refuse.asked)


def keep_record(path: Path | None, results: Results, done: Results | None) -> None:
    """Write what is finished so far. Raises `OutputError`."""
    if path is not None:
        _write(path, signed(results, done).to_json())


def write_record(path: Path | None, text: str) -> None:
    """Write a record where it was asked for, whole or not at all. Raises `OutputError`."""
    if path is not None:
        _write(path, text)
        OUT.print(f"Record written to {escape(str(path))}")


def write_report(path: Path | None, record: Record, against: Published | None = None) -> None:
    """Draw a record where it was asked for, whole or not at all. Raises `OutputError`."""
    if path is not None:
        _write(path, page(record, against))
        OUT.print(f"Report written to {escape(str(path))}")


def report_results(
    results: Results,
    json_path: Path | None,
    title: str,
    markdown_path: Path | None = None,
    report_path: Path | None = None,
    against: Published | None = None,
    *,
    fidelity: bool = False,
) -> None:
    """Print a table of results and write the records where they were asked for.

    Args:
        against: published figures to set them beside.
        fidelity: print how far rows are from the baseline too, which Markdown always says.
    """
    wide, width = (OUT, OUT.width) if OUT.is_terminal else (Console(width=_PAGE), None)
    wide.print(terminal(results, escape(title), width))
    for table in [*(fidelity_terminal(results) if fidelity else ()), *accuracy_tables(results)]:
        wide.print(table)
    write_record(json_path, results.to_json())
    write_record(markdown_path, markdown(results) + report_against(results, against))
    write_report(report_path, results, against)


def report_against(results: Results, against: Published | None) -> str:
    """Print results beside published figures, if there are any; the same in Markdown."""
    if against is None:
        return ""
    wide = OUT if OUT.is_terminal else Console(width=_PAGE)
    for table in against_tables(results, against):
        wide.print(table)
    return "\n" + against_markdown(results, against)


def report_inspection(
    inspection: Inspection, json_path: Path | None, page: Path | None, report_path: Path | None
) -> None:
    """Print what was measured of a model and write the records where they were asked for."""
    whole = replace(inspection, command=shlex.join(["mxtorq", *sys.argv[1:]]))
    wide, width = (OUT, OUT.width) if OUT.is_terminal else (Console(width=_PAGE), None)
    for table in imbalance.terminal(whole, width):
        wide.print(table)
    write_record(json_path, whole.to_json())
    write_record(page, imbalance.markdown(whole))
    write_report(report_path, whole)


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


def report_needs(needs: Needs) -> None:
    """Say what a run will need, and what it goes on from."""
    _ERR.print(needs_table(needs))
    if needs.finished:
        folder = escape(str(partial_folder(Path(needs.out))))
        many = finished_of(needs.finished, needs.layers)
        _ERR.print(f"Going on: {many} in {folder}", soft_wrap=True)


def report_written(path: Path, manifest: Manifest) -> None:
    """Say what was written and that it was read back."""
    OUT.print(checkpoint_facts(manifest, str(path)))
    OUT.print("Read back from disk: it computes what the model in memory computes, bit for bit.")


def report_contents(path: Path, manifest: Manifest) -> None:
    """Say what a checkpoint is, site by site."""
    OUT.print(checkpoint_facts(manifest, str(path)))
    wide = OUT if OUT.is_terminal else Console(width=_PAGE)
    wide.print(checkpoint_sites(manifest))


def report_diagnosis(diagnosis: Diagnosis) -> None:
    """Say what an examination found."""
    wide = OUT if OUT.is_terminal else Console(width=_PAGE)
    for table in diagnosis_tables(diagnosis):
        wide.print(table)
    told = "Nothing is wrong." if diagnosis.healthy else "[bold red]Something is wrong.[/bold red]"
    OUT.print(told)


def report_exported(path: Path, linears: int, notes: Sequence[str]) -> None:
    """Say what was exported, and what to know of it."""
    OUT.print(f"Written to {escape(str(path))}: {linears} quantized linears.")
    OUT.print("Read back from disk and compared, bit for bit.")
    for note in notes:
        OUT.print(escape(note), soft_wrap=True)
