"""A model's row with its answers to tasks: what is asked, what an earlier record has already.

Hours of answers are not lost to an interruption: the record is handed over after the perplexity and
after each task, and a run that goes on takes finished tasks from it. It goes on only with the same:
the weights, the text of the perplexity, where documents come from, how many of each, and the
versions of everything that a figure depends on. What differs is refused and named, never mixed in.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
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
        packages = ("lm_eval", "accelerate", "datasets")
        return {**{name: version(name) for name in packages}, **engine}
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
    row = done.rows[0]
    differences = {
        key: (row.provenance.get(key), provenance[key])
        for key in provenance
        if row.provenance.get(key) != provenance[key]
    }
    if done.versions != versions:
        differences["versions"] = (done.versions, dict(versions))
    for key, (then, now) in differences.items():
        raise UsageError(
            asked="to go on with an earlier record",
            found=f"{key} {then} there, {now} now",
            why="figures of different models, texts, documents or versions are not comparable",
            todo="ask for the same again, or start a new record",
        )
    return row


@contextmanager
def questions(
    plan: TaskPlan | None, done: Results | None, progress: Callable[[str, int, int], None]
) -> "Iterator[Questions | None]":
    """What a plan asks, found before a model is loaded; None without a plan.

    Raises:
        UsageError: as `questions.opened`.
    """
    if plan is None:
        yield None
        return
    # Behind an extra, and it takes seconds to import.
    from mxtorq.evaluation.questions import opened

    answered = done.rows[0].tasks if done is not None and done.rows else {}
    with opened(plan, answered, progress) as found:
        yield found


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
    versions: dict[str, str],
    *,
    save: Callable[[Results], None],
    progress: Callable[[str, int, int], None],
) -> Results:
    """The row of a model, with its answers to questions; answers that it has stay.

    ``source`` is of no use afterwards where ``model`` was asked by an engine.

    Raises:
        MxtorqError: as `harness.score_tasks`.
    """
    from mxtorq.evaluation.harness import score_tasks

    tasks = dict(row.tasks)

    def results() -> Results:
        values = {label: result["value"] for label, result in tasks.items()}
        whole = replace(row, tasks=dict(tasks), averages=averages(values))
        return Results(rows=(whole,), versions=versions)

    def keep(label: str, result: dict[str, Any]) -> None:
        tasks[label] = result
        save(results())

    save(results())
    if not asked.loaded:
        return results()
    if asked.plan.engine == "torch":
        score_tasks(source.model, source.tokenizer, asked, keep, progress)
        return results()
    from mxtorq.evaluation.engine import score_by_engine

    device, dtype, window = source.device, source.dtype, source.longest_window()
    empty_(source.model)  # the engine needs the memory
    trim()
    score_by_engine(model, dtype, device, window, asked, keep, progress)
    return results()
