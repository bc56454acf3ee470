"""The story of one run: load, capture, fit, fuse, round, write, read back.

    quantize    a model becomes a checkpoint that was read back and compared
    evaluate    a model or a checkpoint gets its perplexity, and maybe its accuracy on tasks

`comparison.compare` puts many recipes into one table with the same chapters.

What happens inside of a model, layer by layer, stands in `quantization`.

Each step is a function from values to values; the order below is the order in which things happen
to a model. Progress is a callback. Randomness comes from the recipe's seed alone. Of several ranks
(see `ranks`) each goes through the same steps; the leader alone keeps what is finished.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from mxtorq.asking import (
    earlier_answers,
    earlier_baseline,
    earlier_row,
    harness_versions,
    questions,
    require_asked,
    weights_digest,
    with_answers,
)
from mxtorq.beginnings import (
    calibrate,
    evaluation_data,
    load_model,
    request,
    silent,
    versions,
)
from mxtorq.calibration.activations import StoredInput, stored_inputs
from mxtorq.calibration.data import Windows
from mxtorq.choosing import least_batches
from mxtorq.config import EvaluationPlan, Recipe, method_name, require_ocp, rounding_name
from mxtorq.evaluation.tasks import TaskPlan
from mxtorq.export.carried import carried_matrices, is_carried
from mxtorq.export.checkpoint import is_checkpoint, write_manifest
from mxtorq.export.following import following, require_shared
from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.export.named import named_rotations, rotations_named
from mxtorq.export.targets import Target
from mxtorq.export.unfinished import Unfinished, require_free, unfinished
from mxtorq.judging import (
    baseline,
    measure,
    require_no_outliers,
    require_original_of,
    require_quantized,
    under_rules,
    with_manifest,
)
from mxtorq.loading.checkpoint import load_checkpoint
from mxtorq.loading.heap import trim
from mxtorq.loading.papers import with_card
from mxtorq.loading.skeleton import empty_
from mxtorq.loading.source import Source, pick_device
from mxtorq.loading.writer import kept_linears, stored_tensors, verify, write_checkpoint
from mxtorq.models.family import Family
from mxtorq.originals import load_original
from mxtorq.preflight.check import needs, require
from mxtorq.preflight.job import needs_whole
from mxtorq.quantization import (
    Progress,
    QuantizedLayer,
    choose_rotations,
    first_inputs,
    merge_rotations_,
    quantize_layers_,
)
from mxtorq.ranks import SOLO, Ranks
from mxtorq.reports.needs import Needs
from mxtorq.reports.schema import Results, Row
from mxtorq.sharing import all_transforms
from mxtorq.surgery.fuse import require_fit
from mxtorq.surgery.network import network_shape
from mxtorq.surgery.outliers import profile_called
from mxtorq.transforms.base import OfflineRotations


def quantize(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    family: Family | None = None,
    activation_memory: int | None = None,
    announce: Callable[[Needs], None] | None = None,
    progress: Progress = silent,
    ranks: Ranks = SOLO,
) -> Manifest:
    """Quantize a model into a new folder, and prove that the folder holds what was computed.

    A run that ended early goes on after the last layer that it finished when it is asked for the
    same again, and ends in the same bytes.

    Args:
        model: a folder, a hub id, or ``reference``.
        out: a folder that does not exist; it appears only when everything has succeeded.
        recipe: how.
        device: where it computes.
        family: one of your own (see `mxtorq.models`); the model's ``model_type`` decides otherwise.
        activation_memory: bytes up to which the calibration activations stay in memory; more than
            that is read from disk when it is needed. Unless given, what the rest leaves free, and
            at most a quarter of the free memory.
        announce: told before any work what it will need; how long it takes is measured for that.
        progress: told how far it is.
        ranks: the processes that work on it together, each of which has to call this.

    Raises:
        MxtorqError: with what to do.
    """
    with ranks.leader_first():
        source, unfit, windows, needed = prepare(
            model,
            out,
            recipe,
            device=device,
            family=family,
            activation_memory=activation_memory,
            measured=announce is not None,
            progress=progress,
            ranks=ranks,
        )
        if ranks.leads:
            if announce is not None:
                announce(needed)
            require(needed)
        # What changes the model as a whole needs it whole; all else takes it layer by layer.
        if needs_whole(recipe):
            progress("load the whole model", 0, 1)
            source = load_model(model, recipe.outliers, recipe.seed, device, family)
            progress("load the whole model", 1, 1)
    asked, memory = request(source, recipe, windows), needed.activation_memory
    with unfinished(out, asked) if ranks.leads else following(out) as run:
        finished = ranks.json_from_leader(run.finished)
        if ranks.leads and not finished:
            run.log(
                f"{source.name}: {method_name(recipe.method)}, {rounding_name(recipe.rounding)}, "
                f"{recipe.scale_rule.value} (activations {recipe.activation_rule.value}), "
                f"{windows.ids.numel()} tokens of {windows.source}"
            )
        require_shared(out, asked)
        rotate_(source, windows, recipe, unfit, progress, run, ranks)
        least = least_batches(recipe.method)
        first = first_inputs(source, windows.ids, ranks, least)
        inputs = stored_inputs(first, run.activations, finished, windows.ids.numel(), memory, ranks)
        layers = quantize_layers_(source, inputs, recipe, unfit, progress, finished, ranks)
        for index, layer, done in layers:
            keep_layer_(run, source, index, layer, done, inputs, ranks)
        if not ranks.leads:
            return Manifest.from_json(ranks.json_from_leader(None), str(out))
        progress("write", 0, 2)
        with run.checkpoint() as folder:
            files = write_checkpoint(folder, source, run)
            sites = [entry for record in run.layers for entry in record.sites]
            manifest = describe(source, recipe, windows, sites, unfit, files)
            manifest = with_card(folder, manifest)
            write_manifest(folder, manifest)
            progress("write", 1, 2)
            verify(
                folder,
                source,
                next(first_inputs(source, windows.ids, least=least)),
                inputs[0].hidden,
            )
            ranks.json_from_leader(manifest.to_json())  # the others have waited for this
        progress("write", 2, 2)
    return manifest


def preview(model: str, out: Path, recipe: Recipe, **options: Any) -> Needs:
    """What `quantize` will need with the same arguments, time included; writes nothing.

    Raises:
        MxtorqError: what `quantize` would raise before it begins, but for what does not fit.
    """
    return prepare(model, out, recipe, **options, measured=True)[-1]


def evaluate(
    model: str,
    plan: EvaluationPlan,
    *,
    outliers: str | None = None,
    seed: int = 0,
    device: str = "auto",
    family: Family | None = None,
    targets: Sequence[Target] = (),
    original: str | None = None,
    progress: Progress = silent,
    tasks: TaskPlan | None = None,
    done: Results | None = None,
    save: Callable[[Results], None] = lambda results: None,
) -> Results:
    """The perplexity of a model, or of one of our checkpoints; ``family`` as in `quantize`.

    Args:
        targets: engines under whose scale rules of activations a checkpoint is evaluated too, which
            is what it costs to run it where it was not made for; a row for each other rule.
        original: the model that a checkpoint was made from, whose row then comes first: the
            checkpoint's says how far its predictions and its residual stream are from it.
        tasks: what else to ask it, through the lm-evaluation-harness.
        done: a record of an earlier run of the same, which is gone on with.
        save: gets the record after the perplexity and after each task.

    Raises:
        MxtorqError: with what to do.
    """
    require_quantized(model, targets)
    require_original_of(model, original)
    now = {**versions(), **({} if tasks is None else harness_versions(tasks))}
    with questions(tasks, earlier_answers(done), progress) as asked:
        progress("load", 0, 1)
        if is_checkpoint(Path(model)):
            require_no_outliers(model, outliers)
            source, manifest = load_checkpoint(model, pick_device(device), family)
            outliers = manifest.source["outliers"]
        else:
            source, manifest = load_model(model, outliers, seed, device, family), None
        progress("load", 1, 1)
        windows = evaluation_data(source, plan)
        known: dict[str, Any] = {}
        if tasks is not None or done is not None:
            known["weights_sha256"] = weights_digest(source, manifest)
            known["tasks"] = None if tasks is None else tasks.record()
        beside = None
        if original is not None and manifest is not None:
            beside = load_original(original, source, manifest, family, progress)
            known["original_sha256"] = beside.weights_sha256
        row = earlier_row(done, {**known, "evaluation": windows.record()}, now)
        if tasks is not None:
            require_asked(source.tokenizer, tasks, model, manifest is None and outliers is not None)
        before = earlier_baseline(done) if row is not None else ()
        if beside is not None and not before:
            before = (baseline(beside, windows, outliers, progress),)
        reference = None if beside is None else beside.source.model
        if row is None:
            row = measure(source, windows, outliers, progress, reference)
            row.provenance.update(known)
            row = row if manifest is None else with_manifest(row, manifest)
        others = []
        if manifest is not None:
            others = under_rules(source, manifest, targets, windows, progress, reference)
        if asked is None:
            return Results(rows=(*before, row, *others), versions=now)
        del beside, reference  # tasks are asked of the checkpoint alone

        def results(answered: Row) -> Results:
            return Results(rows=(*before, answered), versions=now)

        row = with_answers(
            source, model, row, asked, save=lambda row: save(results(row)), progress=progress
        )
        return Results(rows=(*before, row, *others), versions=now)


# The chapters.


def prepare(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    family: Family | None = None,
    activation_memory: int | None = None,
    measured: bool,
    progress: Progress = silent,
    ranks: Ranks = SOLO,
) -> tuple[Source, dict[str, int], Windows, Needs]:
    """The model at rest, its sites that stay in BF16, the calibration text, and what is needed."""
    if ranks.leads:
        require_free(out)
    require_ocp(recipe.scale_rule)
    if recipe.outliers is not None:
        profile_called(recipe.outliers)
    progress("load", 0, 2)
    source = load_model(model, None, recipe.seed, device, family, at_rest=True)
    recipe.method.check(network_shape(source.model, source.family))
    unfit = require_fit(source.model, source.family, recipe.allow_unfit)
    progress("load", 1, 2)
    windows = calibrate(source, recipe)
    progress("load", 2, 2)
    progress("preflight", 0, 1)
    measured = measured and ranks.leads
    needed = needs(source, recipe, windows, unfit, out, activation_memory, measured=measured)
    progress("preflight", 1, 1)
    return source, unfit, windows, needed


def rotate_(
    source: Source,
    windows: Windows,
    recipe: Recipe,
    unfit: Mapping[str, int],
    progress: Progress,
    run: Unfinished,
    ranks: Ranks,
) -> None:
    """Merge the method's rotations of the whole model, chosen now or by an earlier process.

    Of several ranks the leader chooses.
    """
    if not recipe.method.rotates:
        return
    rotations = run.rotations() if ranks.leads else OfflineRotations()
    if rotations is None:
        rotations = choose_rotations(source, windows.ids, recipe, progress)
        run.keep_rotations(rotations)
    again = cache(lambda: named_rotations(choose_rotations(source, windows.ids, recipe, silent)))
    shared = all_transforms(ranks, named_rotations(rotations), lambda name: again()[name])
    merge_rotations_(source, rotations_named(shared), unfit)


def keep_layer_(
    run: Unfinished,
    source: Source,
    index: int,
    layer: nn.Module,
    done: QuantizedLayer,
    inputs: Sequence[StoredInput],
    ranks: Ranks,
) -> None:
    """Keep a quantized layer and what the next one gets, and let go of the layer.

    The files of all ranks are whole when the leader calls the layer finished.
    """
    files = ranks.all_json({item.path.name: item.facts for item in inputs})
    if ranks.leads:
        matrices = carried_matrices(done.sites, done.transforms)
        own = [entry.site for entry in done.sites if not is_carried(entry)]
        run.add_layer(
            {**stored_tensors(source, index, layer), **matrices},
            {site: done.transforms[site] for site in own},
            done.sites,
            kept_linears(source, index, layer),
            {name: facts for each in files for name, facts in each.items()},
        )
        errors = [entry.output_error for entry in done.sites]
        mean = sum(errors) / max(1, len(errors))
        run.log(f"layer {index} is finished, mean output error {mean:.3e}")
    empty_(layer)
    trim()


def describe(
    source: Source,
    recipe: Recipe,
    windows: Windows,
    sites: list[SiteEntry],
    unfit: dict[str, int],
    files: dict[str, dict[str, Any]],
) -> Manifest:
    """The manifest of a checkpoint whose files are written."""
    return Manifest(
        method=method_name(recipe.method),
        rounding=rounding_name(recipe.rounding),
        recipe=recipe.to_dict(),
        scale_rules={
            "weights": recipe.scale_rule.value,
            "activations": recipe.activation_rule.value,
        },
        seed=recipe.seed,
        source={
            "model": source.name,
            "family": source.family.name,
            "baseline_dtype": "bfloat16",
            "outliers": recipe.outliers,
        },
        calibration=windows.record(),
        versions=versions(),
        sites=sites,
        unfit=unfit,
        files=files,
    )
