"""``mxtorq export`` as a user runs it."""

import json
from pathlib import Path

from command import alone, here
from mxtorq import pipeline
from mxtorq.config import recipe_from


def test_export_writes_explains_and_refuses(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint"
    settings = {"method": "hadamard", "calibration": str(story)}
    recipe = recipe_from({**settings, "calibration_tokens": 128, "seqlen": 64})
    pipeline.quantize(str(tiny_folders["qwen3"]), source, recipe, device="cpu")

    done = here("export", source, tmp_path / "plain", "--format", "fake-quant")
    assert done.returncode == 1
    assert "--undo-transforms" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "plain").exists()

    record = tmp_path / "record.json"
    options = ("--format", "fake-quant", "--undo-transforms", "--json", record)
    done = alone("export", source, tmp_path / "plain", *options)
    assert done.returncode == 0, done.stderr
    assert "14 quantized linears" in done.stdout
    assert "not of W4A4" in done.stdout
    assert json.loads(record.read_text())["method"] == "hadamard"

    text = here("export", "--help").stdout
    for option in ("--format", "--undo-transforms", "--without-tokenizer", "--json", "Example"):
        assert option in text
