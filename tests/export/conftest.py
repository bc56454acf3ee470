"""Quantized tiny models that exports start from, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mxtorq import pipeline
from mxtorq.config import recipe_from


@pytest.fixture(scope="session")
def quantized(
    tiny_folders: dict[str, Path], story: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``quantized(family, method, rule)``: the folder of a checkpoint."""
    made: dict[tuple[str, str, str], Path] = {}
    root = tmp_path_factory.mktemp("quantized")

    def make(family: str, method: str = "identity", rule: str = "even") -> Path:
        key = (family, method, rule)
        if key not in made:
            out = root / f"{len(made)}-{family}"
            recipe = recipe_from(
                {
                    "method": method,
                    "scale_rule": rule,
                    "calibration": str(story),
                    "calibration_tokens": 128,
                    "seqlen": 64,
                }
            )
            pipeline.quantize(str(tiny_folders[family]), out, recipe, device="cpu")
            made[key] = out
        return made[key]

    return make
