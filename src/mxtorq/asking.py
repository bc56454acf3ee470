"""A model's row with its answers to tasks: what is asked, what an earlier record has already.

Hours of answers are not lost to an interruption: the record is handed over after the perplexity and
after each task, and a run that goes on takes finished tasks from it. It goes on only with the same:
the weights, the text of the perplexity, where documents come from, how many of each, and the
versions of everything that a figure depends on. What differs is refused and named, never mixed in.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mxtorq.errors import UsageError
from mxtorq.evaluation.tasks import TaskPlan, averages
from mxtorq.export.manifest import Manifest
from mxtorq.loading.heap import trim
from mxtorq.loading.skeleton import empty_
from mxtorq.loading.source import REFERENCE, Source
from mxtorq.reports.schema import Results, Row

if TYPE_CHECKING:
    from mxtorq.evaluation.questions import Questions


HARNESS = ("lm_eval", "accelerate", "datasets", "vllm")
"""Packages that answers depend on and nothing else does."""


def harness_versions(plan: TaskPlan) -> dict[str, str]:
    """The versions that accuracies depend on, beside those of any result.

    Raises:
        UsageError: the harness, or the engine, is not installed.
    """
    engine = {}
    if plan.engine == "vllm":
        if find_spec("vllm") is None:
            raise UsageError(
                asked="--engine vllm",
                found="no package vllm",
                why="the engine runs in this environment, beside mxtorq and its tasks extra",
                todo="pip install vllm 'mxtorq[tasks]', or leave --engine away",
            )
        engine = {"vllm": version("vllm")}
    try:
        return {**{name: version(name) for name in HARNESS[:3]}, **engine}
    except PackageNotFoundError as error:
        raise UsageError(
            asked="the accuracy on tasks",
            found=f"no package {error.name}",
            why="tasks are asked through EleutherAI's lm-evaluation-harness, which is an extra",
            todo="pip install 'mxtorq[tasks]'",
        ) from error


def weights_digest(source: Source, manifest: Manifest | None) -> str:
    """Which weights these are: SHA-256 over those of a model, or over a checkpoint's files."""
    if manifest is None:
        return source.fingerprint()
    return hashlib.sha256(json.dumps(manifest.files, sort_keys=True).encode()).hexdigest()


def earlier_row(
    done: Results | None, provenance: Mapping[str, Any], versions: Mapping[str, str]
) -> Row | None:
    """The row of a record that a run goes on with; None without a record.

    Raises:
        UsageError: the record is of something else.
    """
    if done is None or not done.rows:
        return None
    row = _asked_row(done)
    differences = {
        key: (row.provenance.get(key), provenance[key])
        for key in provenance
        if row.provenance.get(key) != provenance[key]
    }
    if done.versions != versions:
        differences["versions"] = different_versions(done.versions, versions)
    for key, (then, now) in differences.items():
        raise UsageError(
            asked="to go on with an earlier record",
            found=f"{key} {then} there, {now} now",
            why="figures of different models, texts, documents or versions are not comparable",
            todo="ask for the same again, or start a new record",
        )
    return row


def different_versions(there: Mapping[str, str], here: Mapping[str, str]) -> tuple[str, str]:
    """What differs between two tables of versions, as words for either side."""
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    told = [
        ", ".join(f"{name} {each.get(name, '(none)')}" for name in names) for each in (there, here)
    ]
    return told[0], told[1]


def earlier_answers(done: Results | None) -> dict[str, dict[str, Any]]:
    """What the row of a record that a run goes on with has answered."""
    return _asked_row(done).tasks if done is not None and done.rows else {}


def earlier_baseline(done: Results | None) -> tuple[Row, ...]:
    """The rows of a record in front of a checkpoint's: its original's, or none."""
    if done is None or not done.rows:
        return ()
    return done.rows[: done.rows.index(_asked_row(done))]


def _asked_row(done: Results) -> Row:
    """The row that was asked: the first of a checkpoint, behind its original's if that is there."""
    return next((row for row in done.rows if row.rounding is not None), done.rows[0])


@contextmanager
def questions(
    plan: TaskPlan | None,
    answered: Mapping[str, dict[str, Any]],
    progress: Callable[[str, int, int], None],
) -> "Iterator[Questions | None]":
    """What a plan asks, found before a model is loaded; None without a plan.

    What is ``answered`` in an earlier record is not asked.

    Raises:
        UsageError: as `questions.opened`.
    """
    if plan is None:
        yield None
        return
    # Behind an extra, and it takes seconds to import.
    from mxtorq.evaluation.questions import opened

    with opened(plan, answered, progress) as found:
        yield found


def require_same_questions(rows: Sequence[Row], plan: TaskPlan, asked: "Questions") -> None:
    """Raises:
    UsageError: earlier rows have answered other documents than are asked now.
    """
    for row in rows:
        then = row.provenance.get("tasks")
        found = None if not row.tasks or then == plan.record() else f"tasks {then} there"
        for label, result in row.tasks.items():
            name = label.partition(":")[0]
            sha256 = asked.sha256.get(name)
            if sha256 is not None and result.get("documents_sha256") != sha256:
                found = f"{label} on other documents than those of {plan.files}"
        if found is not None:
            raise UsageError(
                asked=f"to go on with an earlier record, tasks {plan.record()}",
                found=f"a row of {row.method} with {found}",
                why="accuracies on other documents are not comparable",
                todo="ask for the same again, or start a new record",
            )


def require_asked(tokenizer: Any, plan: TaskPlan, model: str, outliers: bool) -> None:
    """Raises:
    ModelError: as `questions.require_tokens`.
    UsageError: an engine cannot read what is in memory.
    """
    if plan.engine != "torch" and (outliers or model == REFERENCE):
        raise UsageError(
            asked=f"--engine {plan.engine} for {model}" + (" with outliers" if outliers else ""),
            found="a model that is in no folder as it is asked",
            why="the engine reads a folder by itself",
            todo="name a checkpoint that was written with these, or leave --engine away",
        )
    from mxtorq.evaluation.questions import require_tokens

    require_tokens(tokenizer, plan.tasks)


def with_answers(
    source: Source,
    model: str,
    row: Row,
    asked: "Questions",
    *,
    save: Callable[[Row], None],
    progress: Callable[[str, int, int], None],
) -> Row:
    """The row of a model, with its answers to questions; answers that it has stay.

    ``save`` gets it as it is and after each task. ``source`` is of no use afterwards where
    ``model`` was asked by an engine.

    Raises:
        MxtorqError: as `harness.score_tasks`.
    """
    from mxtorq.evaluation.harness import score_tasks

    tasks = dict(row.tasks)

    def answered() -> Row:
        values = {label: result["value"] for label, result in tasks.items()}
        return replace(row, tasks=dict(tasks), averages=averages(values))

    def keep(label: str, result: dict[str, Any]) -> None:
        tasks[label] = result
        save(answered())

    save(answered())
    loaded = {label: task for label, task in asked.loaded.items() if label not in tasks}
    if not loaded:
        return answered()
    left = replace(asked, loaded=loaded)
    if asked.plan.engine == "torch":
        score_tasks(source.model, source.tokenizer, left, keep, progress)
        return answered()
    from mxtorq.evaluation.engine import score_by_engine

    device, dtype, window = source.device, source.dtype, source.longest_window()
    empty_(source.model)  # the engine needs the memory
    trim()
    score_by_engine(model, dtype, device, window, left, keep, progress)
    return answered()
