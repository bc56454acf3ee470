"""The story of one run: load, capture, fit, fuse, round, write, read back.

    quantize    a model becomes a checkpoint that was read back and compared
    evaluate    a model or a checkpoint gets its perplexity

`comparison.compare` puts many recipes into one table with the same chapters.

What happens inside of a model, layer by layer, stands in `quantization`.

Each step is a function from values to values; the order below is the order in which things happen
to a model. Progress is a callback. Randomness comes from the recipe's seed alone. Of several ranks
(see `ranks`) each goes through the same steps; the leader alone keeps what is finished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
from mxtorq.config import EvaluationPlan, Recipe, method_name, require_ocp, rounding_name
from mxtorq.errors import UsageError
from mxtorq.evaluation.perplexity import perplexity
from mxtorq.export.carried import carried_matrices, is_carried
from mxtorq.export.checkpoint import is_checkpoint, write_manifest
from mxtorq.export.following import following, require_shared
from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.export.named import named_rotations, rotations_named
from mxtorq.export.targets import Target
from mxtorq.export.unfinished import Unfinished, require_free, unfinished
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.loading.checkpoint import load_checkpoint
from mxtorq.loading.heap import trim
from mxtorq.loading.papers import with_card
from mxtorq.loading.skeleton import empty_
from mxtorq.loading.source import Source, pick_device
from mxtorq.loading.writer import kept_linears, stored_tensors, verify, write_checkpoint
from mxtorq.models.family import Family
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
from mxtorq.surgery.linear import round_inputs_by_
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
        first = first_inputs(source, windows.ids, ranks)
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
            verify(folder, source, next(first_inputs(source, windows.ids)), inputs[0].hidden)
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
    progress: Progress = silent,
) -> Results:
    """The perplexity of a model, or of one of our checkpoints; ``family`` as in `quantize`.

    For ``targets`` a checkpoint is evaluated under their scale rules of activations too, which is
    what it costs to run it where it was not made for.

    Raises:
        MxtorqError: with what to do.
    """
    progress("load", 0, 1)
    if not is_checkpoint(Path(model)):
        if targets:
            raise UsageError(
                asked=f"{model} under the scale rules of {', '.join(targets)}",
                found="a model that is not quantized",
                why="it rounds no activations",
                todo="pass a checkpoint of mxtorq, or leave --targets out",
            )
        source = load_model(model, outliers, seed, device, family)
        progress("load", 1, 1)
        row = measure(source, evaluation_data(source, plan), outliers, progress)
        return Results(rows=(row,), versions=versions())
    if outliers is not None:
        raise UsageError(
            asked=f"the outliers {outliers!r} in the checkpoint {model}",
            found="quantized weights",
            why="they cannot be rescaled exactly any more",
            todo="pass --outliers to `quantize` instead",
        )
    source, manifest = load_checkpoint(model, pick_device(device), family)
    progress("load", 1, 1)
    windows = evaluation_data(source, plan)
    own = ScaleRule(manifest.scale_rules["activations"])
    rules = dict.fromkeys([own, *(target.card.activations or own for target in targets)])
    rows = []
    for rule in rules:
        round_inputs_by_(source.model, rule)
        measured = measure(source, windows, manifest.source["outliers"], progress)
        rows.append(_row_of(manifest, rule, measured))
    return Results(rows=tuple(rows), versions=versions())


def _row_of(manifest: Manifest, rule: ScaleRule, measured: Row) -> Row:
    """The row of a checkpoint whose activations are rounded by ``rule``."""
    weights = manifest.scale_rules["weights"]
    row = replace(
        measured,
        method=manifest.method,
        options=manifest.recipe["method"],
        rounding=manifest.rounding,
        scale_rule=weights,
        activation_rule=None if rule == weights else rule.value,
        target=manifest.recipe.get("target"),
        seed=manifest.seed,
        site_error=manifest.mean_output_error,
        site_errors={entry.site: entry.output_error for entry in manifest.sites},
        multiply_adds_per_token=manifest.multiply_adds_per_token,
        extra_bytes=manifest.extra_bytes,
    )
    row.provenance.update(
        model=manifest.source["model"],
        recipe=manifest.recipe,
        calibration=manifest.calibration,
        unfit=manifest.unfit,
    )
    return row


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
    require_ocp(recipe)
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


def measure(
    source: Source,
    windows: Windows,
    outliers: str | None,
    progress: Progress,
    reference: torch.nn.Module | None = None,
) -> Row:
    """The row of a model taken as unquantized; callers say what was done to it, if anything."""
    measured = perplexity(
        source.model,
        windows.ids,
        lambda done, total: progress("evaluate", done, total),
        reference,
    )
    return Row(
        method="bf16",
        rounding=None,
        scale_rule=None,
        perplexity=measured.value,
        nll=measured.nll,
        predictions=measured.predictions,
        kl=measured.kl,
        seed=None,
        outliers=outliers,
        provenance={
            "model": source.name,
            "baseline_dtype": "bfloat16",
            "compute_dtype": str(next(source.model.parameters()).dtype).removeprefix("torch."),
            "evaluation": windows.record(),
        },
    )
