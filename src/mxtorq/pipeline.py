"""The story of one run: load, capture, fit, fuse, round, write, read back.

    quantize    a model becomes a checkpoint that was read back and compared
    evaluate    a model or a checkpoint gets its perplexity

`comparison.compare` puts many recipes into one table with the same chapters.

What happens inside of a model, layer by layer, stands in `quantization`.

Each step is a function from values to values; the order below is the order in which things happen
to a model. Progress is a callback. Randomness comes from the recipe's seed alone.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from mxtorq.calibration.activations import StoredInput, stored_inputs
from mxtorq.calibration.data import Windows, calibration_windows, evaluation_windows, load_text
from mxtorq.config import EvaluationPlan, Recipe, method_name, require_ocp, rounding_name
from mxtorq.errors import UsageError
from mxtorq.evaluation.perplexity import perplexity
from mxtorq.export.checkpoint import is_checkpoint, write_manifest
from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.export.unfinished import Unfinished, require_free, unfinished
from mxtorq.loading.checkpoint import load_checkpoint
from mxtorq.loading.papers import with_card
from mxtorq.loading.skeleton import empty_
from mxtorq.loading.source import Source, load_source, pick_device
from mxtorq.loading.writer import kept_linears, stored_tensors, verify, write_checkpoint
from mxtorq.models.family import Family
from mxtorq.quantization import (
    Progress,
    QuantizedLayer,
    choose_rotations,
    first_inputs,
    merge_rotations_,
    quantize_layers_,
)
from mxtorq.reports.schema import Results, Row
from mxtorq.surgery.fuse import require_fit
from mxtorq.surgery.network import network_shape
from mxtorq.surgery.outliers import add_outliers_

DEFAULT_SEQLEN = 2048


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that says nothing."""


def quantize(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    family: Family | None = None,
    activation_memory: int | None = None,
    progress: Progress = silent,
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
            that is read from disk when it is needed. A quarter of the free memory unless given.
        progress: told how far it is.

    Raises:
        MxtorqError: with what to do.
    """
    require_free(out)
    require_ocp(recipe)
    progress("load", 0, 2)
    # What changes the model as a whole needs it whole; all else takes it layer by layer from disk.
    whole = recipe.outliers is not None or recipe.method.rotates
    source = load_model(model, recipe.outliers, recipe.seed, device, family, at_rest=not whole)
    recipe.method.check(network_shape(source.model, source.family))
    unfit = require_fit(source.model, source.family, recipe.allow_unfit)
    progress("load", 1, 2)
    windows = calibrate(source, recipe)
    progress("load", 2, 2)
    if activation_memory is None:
        activation_memory = psutil.virtual_memory().available // 4
    with unfinished(out, request(source, recipe, windows)) as run:
        rotate_(source, windows, recipe, unfit, progress, run)
        first = first_inputs(source, windows.ids)
        inputs = stored_inputs(
            first, run.activations, run.finished, windows.ids.numel(), activation_memory
        )
        layers = quantize_layers_(source, inputs, recipe, unfit, progress, run.finished)
        for index, layer, done in layers:
            keep_layer_(run, source, index, layer, done, inputs)
        progress("write", 0, 2)
        with run.checkpoint() as folder:
            files = write_checkpoint(folder, source, run)
            sites = [entry for record in run.layers for entry in record.sites]
            manifest = describe(source, recipe, windows, sites, unfit, files)
            manifest = with_card(folder, manifest)
            write_manifest(folder, manifest)
            progress("write", 1, 2)
            verify(folder, source, next(first_inputs(source, windows.ids)), inputs[0].hidden)
        progress("write", 2, 2)
    return manifest


def evaluate(
    model: str,
    plan: EvaluationPlan,
    *,
    outliers: str | None = None,
    seed: int = 0,
    device: str = "auto",
    family: Family | None = None,
    progress: Progress = silent,
) -> Results:
    """The perplexity of a model, or of one of our checkpoints; ``family`` as in `quantize`.

    Raises:
        MxtorqError: with what to do.
    """
    progress("load", 0, 1)
    if not is_checkpoint(Path(model)):
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
    row = replace(
        measure(source, windows, manifest.source["outliers"], progress),
        method=manifest.method,
        options=manifest.recipe["method"],
        rounding=manifest.rounding,
        scale_rule=manifest.scale_rules["activations"],
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
    return Results(rows=(row,), versions=versions())


# The chapters.


def load_model(
    model: str,
    outliers: str | None,
    seed: int,
    device: str,
    family: Family | None = None,
    *,
    at_rest: bool = False,
) -> Source:
    """The unquantized model, with the outliers that were asked for.

    ``at_rest`` leaves its weights on disk until `quantize_` comes to them.
    """
    source = load_source(model, pick_device(device), at_rest=at_rest, family=family)
    if outliers is not None:
        add_outliers_(source.model, source.family, outliers, seed)
    return source


def calibrate(source: Source, recipe: Recipe) -> Windows:
    """The token windows that a recipe calibrates on."""
    text = load_text(recipe.calibration, "calibration")
    return calibration_windows(
        text,
        source.tokenizer,
        seqlen=window_length(source, recipe.seqlen),
        tokens=recipe.calibration_tokens,
        seed=recipe.seed,
    )


def evaluation_data(source: Source, plan: EvaluationPlan) -> Windows:
    """The token windows that a plan evaluates on."""
    text = load_text(plan.text, "evaluation")
    seqlen = window_length(source, plan.seqlen)
    return evaluation_windows(text, source.tokenizer, seqlen=seqlen, tokens=plan.eval_tokens)


def window_length(source: Source, asked: int | None) -> int:
    """The window to use: the one asked for, or 2048 or the model's own limit if that is less.

    Raises:
        UsageError: the model was not made for a window that long.
    """
    longest = source.longest_window()
    if asked is None:
        return min(DEFAULT_SEQLEN, longest)
    if asked < 2 or asked > longest:
        raise UsageError(
            asked=f"windows of {asked} tokens",
            found=f"{source.name}, made for 2 to {longest} positions",
            why="perplexity needs one token to predict from, and positions beyond the model's own "
            "mean nothing to it",
            todo=f"pass --seqlen {longest} or less",
        )
    return asked


def request(source: Source, recipe: Recipe, windows: Windows) -> dict[str, Any]:
    """What the bytes of a checkpoint depend on: a run goes on only with the same."""
    return {
        "model": source.name,
        "weights": source.fingerprint(),
        "config": json.loads(source.config.to_json_string()),
        "family": source.family.name,
        "device": source.device.type,
        "recipe": recipe.to_dict(),
        "calibration": windows.record(),
        "versions": versions(),
    }


def rotate_(
    source: Source,
    windows: Windows,
    recipe: Recipe,
    unfit: Mapping[str, int],
    progress: Progress,
    run: Unfinished,
) -> None:
    """Merge the method's rotations of the whole model, chosen now or by an earlier process."""
    if not recipe.method.rotates:
        return
    rotations = run.rotations()
    if rotations is None:
        rotations = choose_rotations(source, windows.ids, recipe, progress)
        run.keep_rotations(rotations)
    merge_rotations_(source, rotations, unfit)


def keep_layer_(
    run: Unfinished,
    source: Source,
    index: int,
    layer: nn.Module,
    done: QuantizedLayer,
    inputs: Sequence[StoredInput],
) -> None:
    """Keep a quantized layer and what the next one gets, and let go of the layer."""
    run.add_layer(
        stored_tensors(source, index, layer),
        done.transforms,
        done.sites,
        kept_linears(source, index, layer),
        {item.path.name: item.facts for item in inputs},
    )
    empty_(layer)
    errors = [entry.output_error for entry in done.sites]
    run.log(f"layer {index} is finished, mean output error {sum(errors) / max(1, len(errors)):.3e}")


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
        scale_rules={"weights": recipe.scale_rule.value, "activations": recipe.scale_rule.value},
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


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("mxtorq", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
