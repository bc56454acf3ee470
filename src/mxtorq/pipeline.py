"""The story of one run: load, capture, fit, fuse, round, write, read back.

    quantize    a model becomes a checkpoint that was read back and compared
    evaluate    a model or a checkpoint gets its perplexity
    compare     one model, many methods, one table: the baseline first

Each step is a function from values to values; the order below is the order in which things happen
to a model. Progress is a callback. Randomness comes from the recipe's seed alone.
"""

import copy
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from mxtorq.calibration.capture import advance_, capture_sites, first_layer_inputs
from mxtorq.calibration.data import Windows, calibration_windows, evaluation_windows, load_text
from mxtorq.config import EvaluationPlan, Recipe, method_name, method_options
from mxtorq.errors import UsageError
from mxtorq.evaluation.fidelity import output_error
from mxtorq.evaluation.perplexity import perplexity
from mxtorq.export.checkpoint import (
    is_checkpoint,
    output_folder,
    require_absent,
    write_manifest,
)
from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.loading.checkpoint import load_checkpoint
from mxtorq.loading.source import Source, load_source, pick_device
from mxtorq.loading.writer import verify, write_model
from mxtorq.models.family import Family, Site
from mxtorq.reports.schema import Results, Row
from mxtorq.rounding import ROUNDINGS
from mxtorq.surgery.fuse import quantize_site_, require_fit
from mxtorq.surgery.linear import fused_weight, linear_at
from mxtorq.surgery.outliers import add_outliers_
from mxtorq.transforms.base import SiteStatistics, Transform

Progress = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)."""

DEFAULT_SEQLEN = 2048


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that says nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """What `quantize_` did to a model."""

    transforms: dict[str, Transform]
    """By site."""
    sites: list[SiteEntry]
    unfit: dict[str, int]


def quantize(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    progress: Progress = silent,
) -> Manifest:
    """Quantize a model into a new folder, and prove that the folder holds what was computed.

    Args:
        model: a folder, a hub id, or ``reference``.
        out: a folder that does not exist; it appears only when everything has succeeded.

    Raises:
        MxtorqError: with what to do; nothing is left behind.
    """
    require_absent(out)
    progress("load", 0, 2)
    source = load_model(model, recipe.outliers, recipe.seed, device)
    progress("load", 1, 2)
    windows = calibrate(source, recipe)
    progress("load", 2, 2)
    with output_folder(out) as folder:
        quantized = quantize_(source, windows.ids, recipe, progress)
        progress("write", 0, 2)
        files = write_model(folder, source, quantized.transforms)
        manifest = describe(source, quantized, recipe, windows, files)
        write_manifest(folder, manifest)
        progress("write", 1, 2)
        verify(folder, source, windows.ids[:1])
        progress("write", 2, 2)
    return manifest


def evaluate(
    model: str,
    plan: EvaluationPlan,
    *,
    outliers: str | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> Results:
    """The perplexity of a model, or of one of our checkpoints.

    Raises:
        MxtorqError: with what to do.
    """
    progress("load", 0, 1)
    if not is_checkpoint(Path(model)):
        source = load_model(model, outliers, seed, device)
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
    source, manifest = load_checkpoint(model, pick_device(device))
    progress("load", 1, 1)
    windows = evaluation_data(source, plan)
    row = replace(
        measure(source, windows, manifest.source["outliers"], progress),
        method=manifest.method,
        options=manifest.options,
        rounding=manifest.rounding,
        scale_rule=manifest.scale_rules["activations"],
        seed=manifest.seed,
        site_error=manifest.mean_output_error,
        multiply_adds_per_token=manifest.multiply_adds_per_token,
    )
    row.provenance.update(
        model=manifest.source["model"], calibration=manifest.calibration, unfit=manifest.unfit
    )
    return Results(rows=(row,), versions=versions())


def compare(
    model: str,
    recipes: Sequence[Recipe],
    plan: EvaluationPlan,
    *,
    device: str = "auto",
    progress: Progress = silent,
) -> Results:
    """Evaluate the baseline and every recipe on one model; baselines once for each outlier profile.

    Raises:
        MxtorqError: with what to do.
    """
    rows: list[Row] = []
    drawn: dict[object, Windows] = {}  # tokenizing a text takes longer than most methods
    for outliers in dict.fromkeys(recipe.outliers for recipe in recipes):
        group = [recipe for recipe in recipes if recipe.outliers == outliers]
        progress("load", 0, 2)
        source = load_model(model, outliers, group[0].seed, device)
        progress("load", 1, 2)
        windows = evaluation_data(source, plan)
        progress("load", 2, 2)
        rows.append(measure(source, windows, outliers, progress))
        for recipe in group:
            key = (recipe.calibration, recipe.calibration_tokens, recipe.seqlen, recipe.seed)
            if key not in drawn:
                drawn[key] = calibrate(source, recipe)
            rows.append(evaluate_recipe(source, recipe, drawn[key], windows, progress))
    return Results(rows=tuple(rows), versions=versions())


# The chapters.


def load_model(model: str, outliers: str | None, seed: int, device: str) -> Source:
    """The unquantized model, with the outliers that were asked for."""
    source = load_source(model, pick_device(device))
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


def quantize_(
    source: Source, windows: Int64[Tensor, "n seqlen"], recipe: Recipe, progress: Progress
) -> Quantized:
    """Quantize a model in place, layer by layer: the quantized layer's output feeds the next."""
    model, family = source.model, source.family
    unfit = require_fit(model, family, recipe.allow_unfit)
    layers = list(model.get_submodule(family.layers).children())
    progress("quantize", 0, len(layers))
    inputs = first_layer_inputs(model, family, windows)
    transforms: dict[str, Transform] = {}
    entries: list[SiteEntry] = []
    for index, layer in enumerate(layers):
        sites = {family.site_name(index, site): site for site in family.sites}
        sites = {name: site for name, site in sites.items() if name not in unfit}
        statistics = capture_sites(layer, sites, inputs, recipe.seed)
        for name, site in sites.items():
            fitted = recipe.method.fit(statistics[name], recipe.seed)
            transforms[name] = fitted.to(statistics[name].hessian.device)
            error = round_site_(layer, site, transforms[name], statistics[name], recipe)
            entries.append(_site_entry(family, index, site, transforms[name], error))
        advance_(layer, inputs)
        progress("quantize", index + 1, len(layers))
    return Quantized(transforms=transforms, sites=entries, unfit=unfit)


def round_site_(
    layer: torch.nn.Module,
    site: Site,
    transform: Transform,
    statistics: SiteStatistics,
    recipe: Recipe,
) -> float:
    """Fuse, round and replace the linears of a site; returns the output error on the sample."""
    originals = {path: linear_at(layer, path) for path in site.linears}

    def hessian() -> Tensor:
        return transform.apply(transform.apply(statistics.hessian).T)

    weights: dict[str, MXFP4] = {}
    for path, linear in originals.items():
        fused = fused_weight(linear, transform).float()
        weights[path] = ROUNDINGS[recipe.rounding](fused, hessian, recipe.scale_rule)
    quantize_site_(layer, site, transform, weights, recipe.scale_rule)
    pairs = ((linear, layer.get_submodule(path)) for path, linear in originals.items())
    return output_error(statistics.sample, pairs)


def describe(
    source: Source,
    quantized: Quantized,
    recipe: Recipe,
    windows: Windows,
    files: dict[str, dict[str, object]],
) -> Manifest:
    """The manifest of a checkpoint whose files are written."""
    return Manifest(
        method=method_name(recipe.method),
        options=method_options(recipe.method),
        rounding=recipe.rounding,
        scale_rules={"weights": recipe.scale_rule, "activations": recipe.scale_rule},
        seed=recipe.seed,
        source={
            "model": source.name,
            "family": source.family.name,
            "baseline_dtype": "bfloat16",
            "outliers": recipe.outliers,
        },
        calibration=windows.record(),
        versions=versions(),
        sites=quantized.sites,
        unfit=quantized.unfit,
        files=files,
    )


def measure(source: Source, windows: Windows, outliers: str | None, progress: Progress) -> Row:
    """The row of a model taken as unquantized; callers say what was done to it, if anything."""
    measured = perplexity(
        source.model, windows.ids, lambda done, total: progress("evaluate", done, total)
    )
    return Row(
        method="bf16",
        rounding=None,
        scale_rule=None,
        perplexity=measured.value,
        nll=measured.nll,
        predictions=measured.predictions,
        seed=None,
        outliers=outliers,
        provenance={
            "model": source.name,
            "baseline_dtype": "bfloat16",
            "compute_dtype": str(next(source.model.parameters()).dtype).removeprefix("torch."),
            "evaluation": windows.record(),
        },
    )


def evaluate_recipe(
    source: Source, recipe: Recipe, calibration: Windows, windows: Windows, progress: Progress
) -> Row:
    """The row of a recipe on a copy of a model, which stays as it is."""
    name = method_name(recipe.method)

    def named(stage: str, done: int, total: int) -> None:
        progress(f"{name}: {stage}", done, total)

    candidate = replace(source, model=copy.deepcopy(source.model))
    started = time.perf_counter()
    quantized = quantize_(candidate, calibration.ids, recipe, named)
    seconds = time.perf_counter() - started
    row = measure(candidate, windows, recipe.outliers, named)
    row.provenance.update(calibration=calibration.record(), unfit=quantized.unfit)
    return replace(
        row,
        method=name,
        options=method_options(recipe.method),
        rounding=recipe.rounding,
        scale_rule=recipe.scale_rule,
        seed=recipe.seed,
        site_error=sum(e.output_error for e in quantized.sites) / len(quantized.sites),
        multiply_adds_per_token=sum(e.multiply_adds for e in quantized.sites),
        quantize_seconds=round(seconds, 3),
    )


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("mxtorq", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _site_entry(
    family: Family, index: int, site: Site, transform: Transform, error: float
) -> SiteEntry:
    return SiteEntry(
        site=family.site_name(index, site),
        linears=[family.linear_name(index, path) for path in site.linears],
        width=transform.width,
        kind=transform.kind,
        multiply_adds=transform.multiply_adds,
        output_error=error,
    )
