"""The story of one run: load, capture, fit, fuse, round, write, read back.

    quantize    a model becomes a checkpoint that was read back and compared
    evaluate    a model or a checkpoint gets its perplexity

`comparison.compare` puts many recipes into one table with the same chapters.

Each step is a function from values to values; the order below is the order in which things happen
to a model. Progress is a callback. Randomness comes from the recipe's seed alone.
"""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from mxtorq.calibration.capture import (
    LayerInput,
    advance_,
    capture_hessians,
    capture_sites,
    first_layer_inputs,
    reader_weights,
)
from mxtorq.calibration.data import Windows, calibration_windows, evaluation_windows, load_text
from mxtorq.config import EvaluationPlan, Recipe, method_name, require_ocp, rounding_name
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
from mxtorq.formats.scales import Scale, fake_quantize
from mxtorq.loading.checkpoint import load_checkpoint
from mxtorq.loading.source import Source, load_source, pick_device
from mxtorq.loading.writer import verify, write_model
from mxtorq.models.family import Family, Site
from mxtorq.reports.schema import Results, Row
from mxtorq.surgery.fuse import quantize_site_, require_fit
from mxtorq.surgery.linear import fused_weight, linear_at
from mxtorq.surgery.network import network, network_shape
from mxtorq.surgery.offline import apply_offline_, round_kept_
from mxtorq.surgery.outliers import add_outliers_
from mxtorq.surgery.rescale import is_norm, merge_diagonal_
from mxtorq.transforms.base import OfflineRotations, SiteStatistics, Transform

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
    search_seconds: float
    """Time in which the method chose its transforms."""


class Stopwatch:
    """Sums up the time spent inside of its ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        self.seconds += time.perf_counter() - self._started


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
    require_ocp(recipe)
    progress("load", 0, 2)
    source = load_model(model, recipe.outliers, recipe.seed, device)
    recipe.method.check(network_shape(source.model, source.family))
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
    searching = Stopwatch()
    with searching:
        rotate_(source, windows, recipe, unfit, progress)
    layers = list(model.get_submodule(family.layers).children())
    progress("quantize", 0, len(layers))
    inputs = first_layer_inputs(model, family, windows)
    transforms: dict[str, Transform] = {}
    entries: list[SiteEntry] = []
    for index, layer in enumerate(layers):
        sites = {family.site_name(index, site): site for site in family.sites}
        sites = {name: site for name, site in sites.items() if name not in unfit}
        statistics = capture_sites(layer, sites, inputs, recipe.seed)
        with searching:
            fitted = {name: recipe.method.fit(statistics[name], recipe.seed) for name in sites}
        fitted, statistics = merge_diagonals_(layer, sites, fitted, statistics)
        hessians = rounding_hessians(layer, sites, inputs, fitted, statistics, recipe)
        for name, site in sites.items():
            error = round_site_(layer, site, fitted[name], hessians[name], statistics[name], recipe)
            entries.append(_site_entry(family, index, site, fitted[name], error))
        transforms |= fitted
        advance_(layer, inputs)
        progress("quantize", index + 1, len(layers))
    return Quantized(
        transforms=transforms, sites=entries, unfit=unfit, search_seconds=searching.seconds
    )


def rotate_(
    source: Source,
    windows: Int64[Tensor, "n seqlen"],
    recipe: Recipe,
    unfit: Mapping[str, int],
    progress: Progress,
) -> None:
    """Merge the method's rotations of the whole model into its weights, if it has any."""
    model, family = source.model, source.family
    whole = replace(
        network(model, family, windows),
        progress=lambda done, total: progress("rotate", done, total),
    )
    rotations = recipe.method.rotations(whole, recipe.seed)
    if rotations == OfflineRotations():
        return
    apply_offline_(model, family, rotations)
    sites = [
        (index, site)
        for index in range(whole.shape.layers)
        for site in family.sites
        if family.site_name(index, site) not in unfit
    ]
    round_kept_(
        model, {family.linear_name(index, path) for index, site in sites for path in site.linears}
    )


def merge_diagonals_(
    layer: torch.nn.Module,
    sites: Mapping[str, Site],
    fitted: Mapping[str, Transform],
    statistics: Mapping[str, SiteStatistics],
) -> tuple[dict[str, Transform], dict[str, SiteStatistics]]:
    """Merge what can be merged; returns what is left online, and statistics that fit it.

    All sites come before any is rounded: the factors of o_in and down_in change rows of v_proj and
    up_proj, which other sites read. A matrix that stays in BF16 is left alone.
    """
    rest, seen = dict(fitted), dict(statistics)
    quantized = {path for site in sites.values() for path in site.linears}
    for name, site in sites.items():
        if site.source in quantized or is_norm(layer, site.source):
            rest[name], factors = merge_diagonal_(layer, site, fitted[name], torch.bfloat16)
            if factors is not None:
                seen[name] = statistics[name].rescaled(factors)
    rest = {name: part.to(statistics[name].hessian.device) for name, part in rest.items()}
    return rest, {
        name: replace(seen[name], weights=reader_weights(layer, site))
        for name, site in sites.items()
    }


def rounding_hessians(
    layer: torch.nn.Module,
    sites: dict[str, Site],
    inputs: list[LayerInput],
    transforms: Mapping[str, Transform],
    statistics: Mapping[str, SiteStatistics],
    recipe: Recipe,
) -> dict[str, Callable[[], Tensor]]:
    """What gives a rounding the Hessian of each site's transformed inputs, when it asks."""
    if recipe.rounding.sees_rounded_inputs:
        through = {
            name: partial(_through, transform, recipe.scale_rule)
            for name, transform in transforms.items()
        }
        rounded = capture_hessians(layer, sites, inputs, through)
        return {name: partial(rounded.__getitem__, name) for name in sites}
    return {
        name: partial(_transformed_hessian, transforms[name], statistics[name]) for name in sites
    }


def round_site_(
    layer: torch.nn.Module,
    site: Site,
    transform: Transform,
    hessian: Callable[[], Tensor],
    statistics: SiteStatistics,
    recipe: Recipe,
) -> float:
    """Fuse, round and replace the linears of a site; returns the output error on the sample.

    The linears are rounded as one stacked matrix, as GPTQ's Hessian is one for all of them.
    """
    originals = {path: linear_at(layer, path) for path in site.linears}
    fused = [fused_weight(linear, transform).float() for linear in originals.values()]
    codes = recipe.rounding.round(torch.cat(fused), hessian, recipe.scale_rule)
    rows = [len(weight) for weight in fused]
    parts = zip(*(part.split(rows) for part in codes), strict=True)
    weights = dict(zip(originals, (type(codes)(*part) for part in parts), strict=True))
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
        sites=quantized.sites,
        unfit=quantized.unfit,
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


def _site_entry(
    family: Family, index: int, site: Site, transform: Transform, error: float
) -> SiteEntry:
    return SiteEntry(
        site=family.site_name(index, site),
        linears=[family.linear_name(index, path) for path in site.linears],
        width=transform.width,
        kind=transform.kind,
        multiply_adds=transform.multiply_adds,
        extra_bytes=sum(
            part.numel() * part.element_size() for part in transform.tensors().values()
        ),
        output_error=error,
    )


def _through(transform: Transform, scale: Scale, values: Tensor) -> Tensor:
    return fake_quantize(transform.apply(values.float()), scale)


def _transformed_hessian(transform: Transform, statistics: SiteStatistics) -> Tensor:
    return transform.apply(transform.apply(statistics.hessian).T)
