"""Quantizing on several ranks gives what one process gives, and a rank that dies stops the others.

Real processes that torchrun starts, with gloo on the CPU. One start has several runs, since a start
costs more than they do: this file is the program of that one.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mxtorq import moments, pipeline
from mxtorq.calibration import capture
from mxtorq.config import Recipe, parse_method, parse_rounding
from mxtorq.errors import OutputError, RankError
from mxtorq.ranks import Ranks, ranks_from_environment
from mxtorq.rounding import correction

CASES = [
    ("llama", "torq", "gptq", True),
    ("llama", "smoothquant:sites=all", "gptq:inputs=corrected", True),  # diagonals that are merged
    ("qwen3", "quarot", "rtn", True),  # rotations of the whole model
    ("qwen3_moe", "torq", "gptq", True),
    ("qwen3_moe", "mxtorq:candidates=hadamard+wush+layer-32", "gptq:inputs=corrected", True),
    # Not told to be exact. A float64 sum of n float32 numbers rounds only where one of them is
    # 2^29 / n times another: with the five here that is one entry in 10^7, of some 10^4.
    ("llama", "torq", "gptq", False),
    ("qwen3_moe", "hadamard", "gptq", False),
    ("llama", "wush", "gptq:inputs=corrected", False),
]
"""Model, method, rounding, and whether sums are those of one process by order."""
RESUMED = 2
"""The one that a single process has begun."""
BATCH_TOKENS = 256
CORRECTION_BLOCK = 64
"""Channels, so that these narrow sites have blocks to share."""
TOKENS = 1280
"""Five batches for two ranks: one of them has nothing to do in the last step."""


def recipe(method: str, rounding: str, text: Path, tokens: int) -> Recipe:
    return Recipe(
        method=parse_method(method),
        rounding=parse_rounding(rounding),
        calibration=str(text),
        calibration_tokens=tokens,
        seqlen=64,
    )


def main(folder: Path) -> None:
    """On each rank: all runs of the plan, and in the end one that is refused."""
    torch.set_num_threads(1)
    capture.BATCH_TOKENS = BATCH_TOKENS
    moments.CORRECTION_BLOCK = correction.CORRECTION_BLOCK = CORRECTION_BLOCK
    plan = json.loads((folder / "plan.json").read_text())
    with ranks_from_environment(torch.device("cpu")) as ranks:
        for model, method, rounding, exact, out in plan["runs"]:
            settings = recipe(method, rounding, Path(plan["text"]), TOKENS)
            same = Ranks(rank=ranks.rank, size=ranks.size, exact=exact)
            done = pipeline.quantize(model, Path(out), settings, device="cpu", ranks=same)
            assert done.method == method
        with pytest.raises(OutputError if ranks.leads else RankError):
            pipeline.quantize(model, Path(out), settings, device="cpu", ranks=ranks)


def begin(run: list[Any], text: Path) -> None:
    """A run of one process that is interrupted when its first layer is finished."""
    model, method, rounding, _, out = run

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantize", 1):
            raise KeyboardInterrupt

    settings = recipe(method, rounding, text, TOKENS)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(capture, "BATCH_TOKENS", BATCH_TOKENS)
        pipeline.quantize(model, Path(out), settings, device="cpu", progress=interrupt)


def torchrun(*arguments: object) -> list[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    return [sys.executable, *map(str, (*launcher, *arguments))]


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "400",
    "PYTHONPATH": os.pathsep.join(sys.path),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: a product's bits depend on how many threads share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def together(
    one_thread: None,
    tiny_folders: dict[str, Path],
    story: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Path]:
    """What two ranks made of the cases."""
    root = tmp_path_factory.mktemp("together")
    outs = [root / f"out-{number}" for number in range(len(CASES))]
    runs = [
        [str(tiny_folders[model]), method, rounding, exact, str(out)]
        for (model, method, rounding, exact), out in zip(CASES, outs, strict=True)
    ]
    begin(runs[RESUMED], story)
    (root / "plan.json").write_text(json.dumps({"text": str(story), "runs": runs}))
    done = subprocess.run(
        torchrun(__file__, root),
        capture_output=True,
        text=True,
        timeout=200,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return outs


@pytest.fixture(scope="module")
def alone_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints of one process lie."""
    return tmp_path_factory.mktemp("alone")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n]}")
def test_two_ranks_write_the_bytes_of_one_process(
    number: int,
    together: list[Path],
    alone_made: Path,
    tiny_folders: dict[str, Path],
    story: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capture, "BATCH_TOKENS", BATCH_TOKENS)
    for module in (moments, correction):
        monkeypatch.setattr(module, "CORRECTION_BLOCK", CORRECTION_BLOCK)
    model, method, rounding, _ = CASES[number]
    out = alone_made / f"{model}-{method}-{rounding}".replace(":", "-")
    if not out.exists():
        settings = recipe(method, rounding, story, TOKENS)
        pipeline.quantize(str(tiny_folders[model]), out, settings, device="cpu")
    alone, shared = contents(out), contents(together[number])
    assert alone.keys() == shared.keys()
    assert [name for name in alone if alone[name] != shared[name]] == []
    names = sorted(path.name for path in together[number].parent.glob(f"out-{number}*"))
    assert names == [f"out-{number}", f"out-{number}.log"]
    log = together[number].with_name(f"out-{number}.log").read_text()
    assert ("going on: 1 layers" in log) == (number == RESUMED)


def test_the_command_on_more_ranks_than_batches(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """One batch: the second rank only rounds. The leader alone reports."""
    model, out = str(tiny_folders["llama"]), tmp_path / "out"
    options = ("--calibration", story, "--calibration-tokens", 512, "--seqlen", 64)
    options = (*options, "--method", "torq")
    done = subprocess.run(
        torchrun("-m", "mxtorq", "quantize", model, out, "--device", "cpu", *options),
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bit for bit") == 1
    assert done.stderr.count("quantize: 2/2") == 1
    pipeline.quantize(model, tmp_path / "one", recipe("torq", "rtn", story, 512), device="cpu")
    assert contents(out) == contents(tmp_path / "one")


def test_a_rank_that_is_killed_stops_the_others_and_one_process_goes_on(
    story: Path, tmp_path: Path
) -> None:
    import tiny_models

    deep = tiny_models.build("llama", num_hidden_layers=6)
    model, out = str(tiny_models.save(deep, tmp_path / "model")), tmp_path / "out"
    options: tuple[Any, ...] = ("--calibration", story, "--calibration-tokens", 4992)
    options = (*options, "--seqlen", 64, "--device", "cpu", "--deterministic-reduce")
    options = (*options, "--method", "torq", "--rounding", "gptq")
    command = torchrun("-m", "mxtorq", "quantize", model, out, *options)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    ) as running:
        partial = tmp_path / "out.partial"
        patience = time.monotonic() + 120
        while not (partial / "layers" / "00001.json").exists():
            assert running.poll() is None
            assert time.monotonic() < patience
            time.sleep(0.01)
        ranks = psutil.Process(running.pid).children(recursive=True)
        (victim,) = [each for each in ranks if each.environ().get("RANK") == "1"]
        victim.kill()
        text, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "another rank ended" in text, text
    assert not any(each.is_running() for each in ranks)
    assert not out.exists()
    finished = len(list(partial.glob("layers/[0-9]*.json")))
    assert 2 <= finished < 6
    settings = recipe("torq", "gptq", story, 4992)
    pipeline.quantize(model, out, settings, device="cpu")
    assert f"going on: {finished} layers" in (tmp_path / "out.log").read_text()
    pipeline.quantize(model, tmp_path / "one", settings, device="cpu")
    assert contents(out) == contents(tmp_path / "one")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
