"""A folder in which the names that the pages use exist: what the stand-ins are, and their sizes.

Models by hub id or folder, and ``reference``, are random models of one layer, wide enough for every
block size that a recipe names. Texts of the hub and the standard library are a few thousand
characters. Two searches are cut short, and `mxtorq` has few candidates. Everything else is what it
is for a reader: recipes, published figures, the program.
"""

import json
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import tiny_models
from mxtorq.transforms.mxtorq import candidates
from task_documents import DOCUMENTS

ROOT = Path(__file__).parents[2]

MODELS = {
    "qwen3": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "Qwen/Qwen3-32B"),
    "llama": (
        *("my-llama", "llama", "my-model", "babyllama-tok361", "llama192"),
        *("meta-llama/Meta-Llama-3-8B", "NousResearch/Meta-Llama-3-8B"),
    ),
}
CHANGES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
}
OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"layer_types": ["full_attention"]},
    "llama": {"head_dim": 32, "attention_bias": False, "mlp_bias": False},
}
SEARCHES = {
    "mxtorq.transforms.torq.method.maximize_entropy": {"rounds": 1},
    "mxtorq.transforms.duquant.method.greedy_rotation": {"steps": 4},
}
"""Searches of hundreds of steps, cut short."""
CANDIDATES = ("identity", "hadamard", "wush", "layer-32", "layer-128")
"""Of `mxtorq`, which has four times as many; to judge one takes a tenth of a second a site."""
STORY = "The quick brown fox jumps over the lazy dog, and the dog, who is old, looks up. " * 100


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for family in MODELS:
        folder = tiny_models.save(
            tiny_models.build(family, **CHANGES, **OWN[family]), root / family
        )
        tokenizer = folder / "tokenizer.json"
        text = tokenizer.read_text(encoding="utf-8")
        assert '"use_regex": false' in text
        # As GPT-2 cuts text into words, which llama.cpp knows.
        tokenizer.write_text(text.replace('"use_regex": false', '"use_regex": true'))
    return {family: root / family for family in MODELS}


def shortened(name: str, fewer: dict[str, int]) -> Any:
    """The function of that name, with fewer steps than it is asked for."""
    search = pkgutil.resolve_name(name)
    return lambda *arguments, **options: search(*arguments, **{**options, **fewer})


@pytest.fixture
def world(models: dict[str, Path], tmp_path: Path) -> Iterator[Path]:
    """The folder that a page's commands run in, from its first to its last."""
    for family, names in MODELS.items():
        for name in names:
            place = tmp_path / name
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(models[family])
    for name in ("recipes", "docs", "benchmarks", "tools", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    rows = [json.dumps({"text": STORY[start:]}) for start in range(40)]
    for name in ("notes.jsonl", "calibration.jsonl", "evaluation.jsonl"):
        (tmp_path / name).write_text("\n".join(rows))
    for name in ("wiki.test.raw", "wiki.train.raw", "story.txt"):
        (tmp_path / name).write_text(STORY)
    (tmp_path / "tasks").mkdir()
    for name, documents in DOCUMENTS.items():
        lines = "\n".join(json.dumps(document) for document in documents)
        (tmp_path / "tasks" / f"{name}.jsonl").write_text(lines)
    with ExitStack() as stack:
        for patched, stand_in in {
            "mxtorq.calibration.data._from_hub": lambda *_, **__: [STORY, STORY],
            "mxtorq.embedded.stdlib_text.documents": lambda split: [f"{split}: {STORY}"] * 10,
            "mxtorq.loading.source.as_file": lambda _: nullcontext(models["qwen3"]),
        }.items():
            stack.enter_context(mock.patch(patched, stand_in))
        few = {name: candidates.CANDIDATES[name] for name in CANDIDATES}
        stack.enter_context(mock.patch.dict(candidates.CANDIDATES, few, clear=True))
        for name, fewer in SEARCHES.items():
            stack.enter_context(mock.patch(name, shortened(name, fewer)))
        yield tmp_path
