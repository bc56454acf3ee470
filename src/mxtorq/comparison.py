"""One model, many recipes, one table: the field's yardstick.

Every row is made in the same run, on the same texts, from the same baseline: perplexity and KL to
the unquantized model, the output error of each site, and what the method costs to search and to
run. A finished row is handed to the caller at once, so that a run that was killed goes on where it
was; a record of other inputs is refused instead of being mixed in.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from mxtorq.beginnings import calibrate, evaluation_data, load_model, silent, versions
from mxtorq.calibration.data import Windows
from mxtorq.config import EvaluationPlan, Recipe, method_name, rounding_name
from mxtorq.errors import UsageError
from mxtorq.formats.scales import is_ocp
from mxtorq.judging import measure
from mxtorq.loading.source import Source
from mxtorq.models.family import Family
from mxtorq.quantization import Progress, quantize_
from mxtorq.reports.schema import Results, Row
from mxtorq.specs import options_of
from mxtorq.surgery.fuse import require_fit
from mxtorq.surgery.network import network_shape
from mxtorq.surgery.outliers import add_outliers_


def compare(
    model: str,
    recipes: Sequence[Recipe],
    plan: EvaluationPlan,
    *,
    device: str = "auto",
    family: Family | None = None,
    progress: Progress = silent,
    done: Results | None = None,
    save: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Evaluate every recipe on one model, after the baseline of its outlier profile.

    Args:
        family: one of your own (see `mxtorq.models`); the model's ``model_type`` decides otherwise.
        done: a record of an earlier run whose rows need not be made again.
        save: gets the record after each new row.

    Raises:
        MxtorqError: with what to do; a recipe that cannot work is refused before any work.
    """
    now = versions()
    if done is not None and done.versions != now:
        raise UsageError(
            asked="to go on with an earlier comparison",
            found=f"rows made with {done.versions}, this is {now}",
            why="rows of different versions are not comparable",
            todo="install those versions, or start a new record",
        )
    # Earlier rows stay, asked for or not: nothing that took hours is dropped.
    rows = list(done.rows) if done is not None else []
    earlier = tuple(rows)

    def add(row: Row, recipe: Recipe | None) -> None:
        asked = None if recipe is None else recipe.to_dict()
        row.provenance.update(identity, recipe=asked)
        rows.append(row)
        save(Results(rows=tuple(rows), versions=now))

    recipes = list(dict.fromkeys(recipes))  # a row stands for itself once
    finished = 0
    progress("compare", finished, len(recipes))
    progress("load", 0, 2)
    plain = load_model(model, None, 0, device, family)
    shape = network_shape(plain.model, plain.family)
    for recipe in recipes:
        recipe.method.check(shape)
        require_fit(plain.model, plain.family, recipe.allow_unfit)
    progress("load", 1, 2)
    windows = evaluation_data(plain, plan)
    identity: dict[str, object] = {
        "model": model,
        "weights_sha256": plain.fingerprint(),
        "evaluation": windows.record(),
    }
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
            if _found(earlier, {**identity, "recipe": None}, outliers) is None:
                add(measure(source, windows, outliers, progress), None)
        for recipe in recipes:
            if (recipe.outliers, recipe.seed) != (outliers, seed):
                continue
            if _found(earlier, {**identity, "recipe": recipe.to_dict()}, outliers) is None:
                key = (recipe.calibration, recipe.calibration_tokens, recipe.seqlen, recipe.seed)
                if key not in drawn:
                    drawn[key] = calibrate(source, recipe)
                said = _named(progress, recipe)
                add(evaluate_recipe(source, recipe, drawn[key], windows, said), recipe)
            finished += 1
            progress("compare", finished, len(recipes))
    return Results(rows=tuple(rows), versions=now)


def evaluate_recipe(
    source: Source, recipe: Recipe, calibration: Windows, windows: Windows, progress: Progress
) -> Row:
    """The row of a recipe on a copy of a model, which stays as it is."""
    candidate = replace(source, model=copy.deepcopy(source.model))
    started = time.perf_counter()
    quantized = quantize_(candidate, calibration.ids, recipe, progress)
    seconds = time.perf_counter() - started
    row = measure(candidate, windows, recipe.outliers, progress, reference=source.model)
    row.provenance.update(calibration=calibration.record(), unfit=quantized.unfit)
    errors = {entry.site: entry.output_error for entry in quantized.sites}
    return replace(
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
        multiply_adds_per_token=sum(entry.multiply_adds for entry in quantized.sites),
        extra_bytes=sum(entry.extra_bytes for entry in quantized.sites),
        search_seconds=round(quantized.search_seconds, 3),
        quantize_seconds=round(seconds, 3),
    )


def _found(rows: Sequence[Row], wanted: dict[str, object], outliers: str | None) -> Row | None:
    """The finished row of a recipe on this model and text.

    Raises:
        UsageError: the record is of another model or text.
    """
    for row in rows:
        found = {key: row.provenance.get(key) for key in wanted}
        for key in ("model", "weights_sha256", "evaluation"):
            if found[key] != wanted[key]:
                raise UsageError(
                    asked=f"to go on with an earlier comparison on {wanted[key]}",
                    found=f"a record of {found[key]}",
                    why="rows of different models or texts are not comparable",
                    todo="name the same model and text, or start a new record",
                )
        if found == wanted and row.outliers == outliers:
            return row
    return None


def _named(progress: Progress, recipe: Recipe) -> Progress:
    name = f"{method_name(recipe.method)} {rounding_name(recipe.rounding)}"
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)
