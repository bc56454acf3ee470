"""A model's row in a table: what was measured, and what a manifest knows of how it was made.

A checkpoint is measured as it says that its activations are rounded. Under the rules of other
engines it gets other rows, which are what it costs to run it where it was not made for.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mxtorq.calibration.data import Windows
from mxtorq.errors import UsageError
from mxtorq.evaluation.fidelity import same_stream
from mxtorq.evaluation.perplexity import perplexity
from mxtorq.export.checkpoint import is_checkpoint
from mxtorq.export.manifest import Manifest
from mxtorq.export.targets import Target
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.loading.source import Source
from mxtorq.originals import Original
from mxtorq.quantization import Progress
from mxtorq.reports.choices import candidates_of
from mxtorq.reports.schema import Row
from mxtorq.surgery.linear import round_inputs_by_


def measure(
    source: Source,
    windows: Windows,
    outliers: str | None,
    progress: Progress,
    reference: torch.nn.Module | None = None,
) -> Row:
    """The row of a model taken as unquantized; callers say what was done to it, if anything."""
    family = source.family
    follows = reference is not None and same_stream(source.model, reference, family.embedding)
    measured = perplexity(
        source.model,
        windows.ids,
        lambda done, total: progress("evaluate", done, total),
        reference,
        family.layers if follows else None,
    )
    return Row(
        method="bf16",
        rounding=None,
        scale_rule=None,
        perplexity=measured.value,
        nll=measured.nll,
        predictions=measured.predictions,
        kl=measured.kl,
        kl_p99=measured.kl_p99,
        agreement=measured.agreement,
        layer_errors=measured.layer_errors,
        windows=measured.windows,
        seed=None,
        outliers=outliers,
        provenance={
            "model": source.name,
            "baseline_dtype": "bfloat16",
            "compute_dtype": str(next(source.model.parameters()).dtype).removeprefix("torch."),
            "evaluation": windows.record(),
        },
    )


def with_manifest(row: Row, manifest: Manifest) -> Row:
    """The row of a checkpoint, with what its manifest says of how it was made."""
    weights, activations = (manifest.scale_rules[part] for part in ("weights", "activations"))
    row = replace(
        row,
        method=manifest.method,
        options=manifest.recipe["method"],
        rounding=manifest.rounding,
        scale_rule=weights,
        activation_rule=None if activations == weights else activations,
        target=manifest.recipe.get("target"),
        seed=manifest.seed,
        site_error=manifest.mean_output_error,
        site_errors={entry.site: entry.output_error for entry in manifest.sites},
        choices=candidates_of(manifest.sites),
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


def baseline(original: Original, windows: Windows, outliers: str | None, progress: Progress) -> Row:
    """The row of the model that a checkpoint was made from, as `comparison.compare` has it."""
    row = measure(original.source, windows, outliers, progress)
    row.provenance.update(weights_sha256=original.weights_sha256, recipe=None)
    return row


def require_original_of(model: str, original: str | None) -> None:
    """Raises:
    UsageError: an original is named of a model that is none's checkpoint.
    """
    if original is not None and not is_checkpoint(Path(model)):
        raise UsageError(
            asked=f"how far {model} is from the original {original}",
            found="a model that is not quantized",
            why="a checkpoint of mxtorq is compared with what it was made from",
            todo="pass a checkpoint of mxtorq, or leave --original out",
        )


def require_quantized(model: str, targets: Sequence[Target]) -> None:
    """Raises:
    UsageError: scale rules of activations are wanted of a model that rounds none.
    """
    if targets and not is_checkpoint(Path(model)):
        raise UsageError(
            asked=f"{model} under the scale rules of {', '.join(targets)}",
            found="a model that is not quantized",
            why="it rounds no activations",
            todo="pass a checkpoint of mxtorq, or leave --targets out",
        )


def under_rules(
    source: Source,
    manifest: Manifest,
    targets: Sequence[Target],
    windows: Windows,
    progress: Progress,
    reference: torch.nn.Module | None = None,
) -> list[Row]:
    """The rows of a checkpoint under the scale rules of engines that are not its own."""
    own, weights = (ScaleRule(manifest.scale_rules[part]) for part in ("activations", "weights"))
    rules = dict.fromkeys(target.card.activations or own for target in targets)
    rows = []
    for rule in rules:
        if rule is not own:
            round_inputs_by_(source.model, rule)
            row = measure(source, windows, manifest.source["outliers"], progress, reference)
            other = None if rule is weights else rule.value
            rows.append(replace(with_manifest(row, manifest), activation_rule=other))
    round_inputs_by_(source.model, own)
    return rows


def require_no_outliers(model: str, outliers: str | None) -> None:
    """Raises:
    UsageError: outliers are wanted in a checkpoint.
    """
    if outliers is not None:
        raise UsageError(
            asked=f"the outliers {outliers!r} in the checkpoint {model}",
            found="quantized weights",
            why="they cannot be rescaled exactly any more",
            todo="pass --outliers to `quantize` instead",
        )
