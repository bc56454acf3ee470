"""What every story begins with: a model, its texts, and what a result will depend on."""

import json
import platform
from importlib.metadata import version
from typing import Any

import torch

from mxtorq.calibration.data import Windows, calibration_windows, evaluation_windows, load_text
from mxtorq.choosing import require_windows
from mxtorq.config import EvaluationPlan, Recipe
from mxtorq.errors import UsageError
from mxtorq.loading.source import Source, load_source, pick_device
from mxtorq.models.family import Family
from mxtorq.surgery.outliers import add_outliers_

DEFAULT_SEQLEN = 2048


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that says nothing."""


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
    """The token windows that a recipe calibrates on.

    Raises:
        UsageError: the text is too short, or its windows are too few for the method.
    """
    text = load_text(recipe.calibration, "calibration")
    windows = calibration_windows(
        text,
        source.tokenizer,
        seqlen=window_length(source, recipe.seqlen),
        tokens=recipe.calibration_tokens,
        seed=recipe.seed,
    )
    require_windows(recipe.method, len(windows.ids))
    return windows


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
        "machine": machine(source.device),
        "recipe": recipe.to_dict(),
        "calibration": windows.record(),
        "versions": versions(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What sums are ordered by: layers made elsewhere would not be reproduced bit by bit here."""
    if device.type == "cpu":
        return {
            "device": "cpu",
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    kind: Any = torch.get_device_module(device)
    return {"device": device.type, "name": kind.get_device_name(device)}


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("mxtorq", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
