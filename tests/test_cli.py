"""The command as a user runs it: in its own process, with exit codes and messages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mxtorq.reports.schema import Results


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mxtorq", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


SMALL = ("--calibration-tokens", 256, "--seqlen", 64)


def test_help_shows_verbs_options_and_examples() -> None:
    text = run("--help").stdout
    for verb in ("quantize", "evaluate", "compare", "inspect", "demo"):
        assert verb in text
        assert "Example" in run(verb, "--help").stdout
    shared = ["--method", "--rounding", "--scale-rule", "--calibration", "--calibration-tokens"]
    for option in [*shared, "--seqlen", "--seed", "--outliers", "--allow-unfit"]:
        assert option in run("quantize", "--help").stdout, option
    for option in ["--methods", *shared[1:], "--text", "--eval-tokens", "--seed", "--json"]:
        assert option in run("compare", "--help").stdout, option


def test_quantize_inspect_evaluate_compare(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    model, out = tiny_folders["qwen3"], tmp_path / "out"
    common = ("--calibration", story, *SMALL)
    done = run("quantize", model, out, *common, "--method", "torq:levels=inter")
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
    assert done.stdout.count("torq:levels=inter") == 1

    done = run("inspect", out, "--json", tmp_path / "manifest.json")
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.down_in" in done.stdout
    assert json.loads((tmp_path / "manifest.json").read_text())["method"] == "torq:levels=inter"

    record = tmp_path / "evaluation.json"
    done = run(
        "evaluate", out, "--text", story, "--seqlen", 64, "--eval-tokens", 256, "--json", record
    )
    assert done.returncode == 0, done.stderr
    (row,) = Results.from_json(record.read_text()).rows
    assert row.method == "torq:levels=inter"

    record = tmp_path / "comparison.json"
    done = run(
        "compare",
        model,
        *common,
        *("--methods", "identity,torq:levels=inter", "--text", story, "--eval-tokens", 256),
        *("--json", record),
    )
    assert done.returncode == 0, done.stderr
    results = Results.from_json(record.read_text())
    assert [r.method for r in results.rows] == ["bf16", "identity", "torq:levels=inter"]
    assert results.rows[2].perplexity == row.perplexity
    assert results.command.startswith("mxtorq compare")
    for line in results.rows:
        assert f"{line.perplexity:.4f}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "./no-model", "OUT"), "hub id"),
        (("quantize", "a", "b", "c"), "[MODEL] OUT"),
        (("quantize", "MODEL", "OUT", "--method", "torc"), "did you mean 'torq'"),
        (("quantize", "MODEL", "OUT", "--scale-rule", "flor"), "did you mean 'floor'"),
        (("quantize", "MODEL", "OUT", "--rounding", "gptq"), "the rounding 'gptq'"),
        (("quantize", "MODEL", "OUT", "--seqlen", "4096"), "--seqlen 128 or less"),
        (("quantize", "MODEL", "OUT", "--calibration", "none.txt"), "FileNotFoundError"),
        (("quantize", "MODEL", "MODEL"), "nothing is overwritten"),
        (("evaluate", "MODEL", "--json", "no/such/folder/x.json"), "existing folder"),
        (("evaluate", "MODEL", "--outliers", "x"), "qwen3-0.6b"),
        (("inspect", "MODEL"), "mxtorq.json"),
    ],
)
def test_errors_teach_and_write_nothing(
    arguments: tuple[str, ...], message: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = str(tiny_folders["llama"])
    done = run(*(model if a == "MODEL" else a for a in arguments), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stderr
    for part in ("asked:", "found:", "why:", "to do:"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("quantise").returncode == 2
    assert run("quantize").returncode == 2
    assert run("evaluate", "reference", "--eval-tokens", "many").returncode == 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_quickly_and_leaves_nothing(
    how: signal.Signals, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Interrupted when the hidden folder is there, so that there is something to clean up."""
    work = subprocess.Popen(
        [
            *(sys.executable, "-m", "mxtorq", "quantize", str(tiny_folders["llama"]), "out"),
            *("--calibration-tokens", "128000", "--seqlen", "128"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()) and work.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert work.poll() is None, work.communicate()
    work.send_signal(how)
    _, errors = work.communicate(timeout=60)
    assert work.returncode == 130
    assert "Interrupted: nothing was written to out" in errors
    assert list(tmp_path.iterdir()) == []


def test_demo_shows_every_method_without_and_with_outliers(tmp_path: Path) -> None:
    record = tmp_path / "demo.json"
    done = run(
        "demo",
        *("--methods", "identity,torq:levels=inter", "--json", record, "--out", tmp_path / "kept"),
        *("--calibration-tokens", 2048, "--eval-tokens", 2048),
    )
    assert done.returncode == 0, done.stderr
    rows = Results.from_json(record.read_text()).rows
    methods = ["bf16", "identity", "torq:levels=inter"]
    assert [row.method for row in rows] == methods * 2
    assert [row.outliers for row in rows] == [None] * 3 + ["qwen3-0.6b"] * 3
    assert "Not a measurement of that LLM" in done.stdout
    assert "bit for bit" in done.stdout
    assert run("inspect", tmp_path / "kept").returncode == 0
