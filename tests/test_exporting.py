"""``mxtorq export`` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mxtorq import pipeline
from mxtorq.config import recipe_from


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mxtorq", "export", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


def test_export_writes_explains_and_refuses(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint"
    settings = {"method": "hadamard", "calibration": str(story)}
    recipe = recipe_from({**settings, "calibration_tokens": 128, "seqlen": 64})
    pipeline.quantize(str(tiny_folders["qwen3"]), source, recipe, device="cpu")

    done = run(source, tmp_path / "plain", "--format", "fake-quant")
    assert done.returncode == 1
    assert "--undo-transforms" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "plain").exists()

    record = tmp_path / "record.json"
    options = ("--format", "fake-quant", "--undo-transforms", "--json", record)
    done = run(source, tmp_path / "plain", *options)
    assert done.returncode == 0, done.stderr
    assert "14 quantized linears" in done.stdout
    assert "not of W4A4" in done.stdout
    assert json.loads(record.read_text())["method"] == "hadamard"

    text = run("--help").stdout
    for option in ("--format", "--undo-transforms", "--without-tokenizer", "--json", "Example"):
        assert option in text
