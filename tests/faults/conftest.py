"""A server that forks runs, and what the runs give when nothing happens to them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_models
from faults.harness import Run, Server, undisturbed
from mxtorq.transforms.mxtorq.method import MXTORQ

LIGHT_TORQ = "torq:rounds=1:top=2:pairs=1:blocks=64"
LIGHT_MXTORQ = "mxtorq:candidates=hadamard+wush+layer-32"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("answers"))
    yield started
    started.stop()


@pytest.fixture(scope="session")
def runs(
    server: Server, tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, Path]
) -> dict[str, Run]:
    """One of each way through the files: in memory or spilled, one file or many, rotated or not,
    and one that chooses."""
    root = tmp_path_factory.mktemp("undisturbed")
    (root / "story.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    deep = tiny_models.save(tiny_models.build("mistral", num_hidden_layers=3), root / "deep")
    data = {"calibration": str(root / "story.txt"), "calibration_tokens": 256, "seqlen": 64}
    torq = {**data, "method": LIGHT_TORQ, "rounding": "gptq"}
    chosen = {**data, "method": LIGHT_MXTORQ, "rounding": MXTORQ.usual_rounding}
    quarot = {**data, "method": "quarot", "rounding": "rtn"}
    llama = tiny_folders["llama"]
    made = {
        "kept": Run(model=llama, recipe=torq),
        "spilled": Run(model=deep, recipe=torq, memory=0, shards=True),
        "rotated": Run(model=llama, recipe=quarot, shards=True),
        "rotated-spilled": Run(model=llama, recipe={**quarot, "rounding": "gptq"}, memory=0),
        "chosen": Run(model=llama, recipe=chosen, memory=0),
    }
    for name, run in made.items():
        (root / name).mkdir()
        undisturbed(server, run, root / name / "out")
    return made
