"""One model, many recipes, one table: the field's yardstick.

Every row is made in the same run, on the same texts, from the same baseline: perplexity and KL to
the unquantized model, the output error of each site, what the method costs to search and to run,
and the answers to tasks if some are asked. A finished row is handed to the caller at once, and so
is each finished task, so that a run that was killed goes on where it was; a record of other inputs
is refused instead of being mixed in.

A row that lacks answers is quantized again, for they are the answers of its model. Where that has
the same error at every site, to the bit, it is the same model: then its figures and answers stay
and the others are added. Otherwise the row is made anew.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mxtorq.asking import (
    HARNESS,
    different_versions,
    harness_versions,
    questions,
    require_asked,
    require_same_questions,
    with_answers,
)
from mxtorq.beginnings import calibrate, evaluation_data, load_model, silent, versions
from mxtorq.calibration.data import Windows
from mxtorq.config import EvaluationPlan, Recipe, method_name, rounding_name
from mxtorq.errors import UsageError
from mxtorq.evaluation.tasks import TaskPlan
from mxtorq.formats.scales import is_ocp
from mxtorq.judging import measure
from mxtorq.loading.source import Source
from mxtorq.models.family import Family
from mxtorq.quantization import Progress, quantize_
from mxtorq.reports.choices import candidates_of
from mxtorq.reports.schema import Results, Row
from mxtorq.specs import options_of
from mxtorq.surgery.fuse import require_fit
from mxtorq.surgery.network import network_shape
from mxtorq.surgery.outliers import add_outliers_

if TYPE_CHECKING:
    from mxtorq.evaluation.questions import Questions


def compare(
    model: str,
    recipes: Sequence[Recipe],
    plan: EvaluationPlan,
    *,
    device: str = "auto",
    family: Family | None = None,
    progress: Progress = silent,
    tasks: TaskPlan | None = None,
    done: Results | None = None,
    save: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Evaluate every recipe on one model, after the baseline of its outlier profile.

    Args:
        family: one of your own (see `mxtorq.models`); the model's ``model_type`` decides otherwise.
        tasks: what else to ask every row, the baselines too, through the lm-evaluation-harness.
        done: a record of an earlier run whose rows need not be made again.
        save: gets the record after each new row, and after each task.

    Raises:
        MxtorqError: with what to do; a recipe that cannot work is refused before any work.
    """
    require_in_memory(tasks)
    record = _Record(done, _versions(tasks, done), save)
    recipes = list(dict.fromkeys(recipes))  # a row stands for itself once
    finished = 0
    with questions(tasks, {}, progress) as asked:
        if tasks is not None and asked is not None:
            require_same_questions(record.rows, tasks, asked)
        progress("compare", finished, len(recipes))
        progress("load", 0, 2)
        plain = load_model(model, None, 0, device, family)
        shape = network_shape(plain.model, plain.family)
        for recipe in recipes:
            recipe.method.check(shape)
            require_fit(plain.model, plain.family, recipe.allow_unfit)
        if tasks is not None:
            require_asked(plain.tokenizer, tasks, model, outliers=False)
        progress("load", 1, 2)
        windows = evaluation_data(plain, plan)
        record.of(
            {
                "model": model,
                "weights_sha256": plain.fingerprint(),
                "evaluation": windows.record(),
            },
            asked,
        )
        progress("load", 2, 2)
        drawn: dict[object, Windows] = {}  # tokenizing a text takes longer than most methods
        measured: set[str | None] = set()
        for outliers, seed in dict.fromkeys((r.outliers, r.seed) for r in recipes):
            source = plain
            if outliers is not None:
                source = replace(plain, model=copy.deepcopy(plain.model))
                add_outliers_(source.model, source.family, outliers, seed)
            if outliers not in measured:
                measured.add(outliers)
                row = record.found(None, outliers) or measure(source, windows, outliers, progress)
                if not record.is_whole(row):
                    record.keep(row, None, source, _named(progress, "bf16"))
            for recipe in recipes:
                if (recipe.outliers, recipe.seed) != (outliers, seed):
                    continue
                earlier = record.found(recipe, outliers)
                if earlier is None or not record.is_whole(earlier):
                    key = recipe.calibration, recipe.calibration_tokens, recipe.seqlen, recipe.seed
                    if key not in drawn:
                        drawn[key] = calibrate(source, recipe)
                    name = f"{method_name(recipe.method)} {rounding_name(recipe.rounding)}"
                    said = _named(progress, name)
                    candidate, row = evaluate_recipe(
                        source, recipe, drawn[key], windows, said, earlier
                    )
                    record.keep(row, recipe, candidate, said)
                finished += 1
                progress("compare", finished, len(recipes))
    return record.results()


class _Record:
    """The rows so far. Earlier ones stay, asked for or not: nothing that took hours is dropped."""

    def __init__(
        self, done: Results | None, versions: dict[str, str], save: Callable[[Results], None]
    ) -> None:
        self.rows = list(done.rows) if done is not None else []
        self._versions, self._save = versions, save
        self._identity: dict[str, object] = {}
        self._asked: Questions | None = None

    def of(self, identity: dict[str, object], asked: "Questions | None") -> None:
        """Say what all rows are of, and what they are asked.

        Raises:
            UsageError: the record is of another model or text.
        """
        self._identity, self._asked = identity, asked
        for row in self.rows:
            for key in identity:
                if row.provenance.get(key) != identity[key]:
                    raise UsageError(
                        asked=f"to go on with an earlier comparison on {identity[key]}",
                        found=f"a record of {row.provenance.get(key)}",
                        why="rows of different models or texts are not comparable",
                        todo="name the same model and text, or start a new record",
                    )

    def results(self) -> Results:
        return Results(rows=tuple(self.rows), versions=self._versions)

    def found(self, recipe: Recipe | None, outliers: str | None) -> Row | None:
        """The row of a recipe, or of the baseline, finished or not."""
        said = None if recipe is None else recipe.to_dict()
        for row in self.rows:
            if row.provenance.get("recipe") == said and row.outliers == outliers:
                return row
        return None

    def is_whole(self, row: Row) -> bool:
        """Whether a row is in the record and has answered everything that is asked."""
        asked = self._asked.plan.tasks if self._asked is not None else ()
        return row in self.rows and all(task.label in row.tasks for task in asked)

    def keep(self, row: Row, recipe: Recipe | None, source: Source, progress: Progress) -> None:
        """Put a row where the earlier one of its recipe is, or at the end, with its answers."""
        earlier = self.found(recipe, row.outliers)
        at = len(self.rows) if earlier is None else self.rows.index(earlier)
        said = {**self._identity, "recipe": None if recipe is None else recipe.to_dict()}
        if self._asked is not None:
            said["tasks"] = self._asked.plan.record()
        row = replace(row, provenance={**row.provenance, **said})

        def put(row: Row) -> None:
            self.rows[at : at + 1] = [row]
            self._save(self.results())

        if self._asked is None:
            put(row)
            return
        with_answers(source, source.name, row, self._asked, save=put, progress=progress)


def evaluate_recipe(
    source: Source,
    recipe: Recipe,
    calibration: Windows,
    windows: Windows,
    progress: Progress,
    earlier: Row | None = None,
) -> tuple[Source, Row]:
    """A recipe on a copy of a model, which stays as it is, and its row.

    An ``earlier`` row is kept if it is of the same quantized model.
    """
    candidate = replace(source, model=copy.deepcopy(source.model))
    started = time.perf_counter()
    quantized = quantize_(candidate, calibration.ids, recipe, progress)
    seconds = time.perf_counter() - started
    errors = {entry.site: entry.output_error for entry in quantized.sites}
    if earlier is not None and earlier.site_errors == errors:
        return candidate, earlier
    row = measure(candidate, windows, recipe.outliers, progress, reference=source.model)
    row.provenance.update(calibration=calibration.record(), unfit=quantized.unfit)
    row = replace(
        row,
        method=method_name(recipe.method),
        options=options_of(recipe.method),
        rounding=rounding_name(recipe.rounding),
        scale_rule=recipe.scale_rule.value,
        activation_rule=None
        if recipe.activation_rule == recipe.scale_rule
        else recipe.activation_rule.value,
        target=recipe.target.value,
        ocp=is_ocp(recipe.scale_rule),
        seed=recipe.seed,
        site_error=sum(errors.values()) / len(errors),
        site_errors=errors,
        choices=candidates_of(quantized.sites),
        multiply_adds_per_token=sum(entry.multiply_adds for entry in quantized.sites),
        extra_bytes=sum(entry.extra_bytes for entry in quantized.sites),
        search_seconds=round(quantized.search_seconds, 3),
        quantize_seconds=round(seconds, 3),
    )
    return candidate, row


def require_in_memory(tasks: TaskPlan | None) -> None:
    """Raises:
    UsageError: an engine is to be asked, which reads folders.
    """
    if tasks is not None and tasks.engine != "torch":
        raise UsageError(
            asked=f"the rows of a comparison through {tasks.engine}",
            found="quantized models that are in memory and in no folder",
            why="the engine reads a folder by itself",
            todo=f"leave the engine out, or `mxtorq quantize` and then `mxtorq evaluate --engine "
            f"{tasks.engine}`",
        )


def _versions(tasks: TaskPlan | None, done: Results | None) -> dict[str, str]:
    """What rows depend on now. A record without tasks may get some.

    Raises:
        UsageError: earlier rows were made with others.
    """
    now = {**versions(), **({} if tasks is None else harness_versions(tasks))}
    if done is None:
        return now
    lacking = {name for name in HARNESS if name not in done.versions or name not in now}
    there, here = (
        {name: version for name, version in each.items() if name not in lacking}
        for each in (done.versions, now)
    )
    if there != here:
        then, today = different_versions(there, here)
        raise UsageError(
            asked="to go on with an earlier comparison",
            found=f"rows made with {then}, this is {today}",
            why="rows of different versions are not comparable",
            todo="install those versions, or start a new record",
        )
    return {**done.versions, **now}


def _named(progress: Progress, name: str) -> Progress:
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)
