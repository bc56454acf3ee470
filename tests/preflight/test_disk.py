"""The forecast beside what a run really writes."""

from pathlib import Path

import pytest

import mxtorq.writing
import tiny_models
from mxtorq import pipeline
from mxtorq.config import Recipe, parse_method
from mxtorq.export.output import bytes_below, partial_folder
from mxtorq.reports.needs import Needs

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3}


@pytest.mark.parametrize("method", ["identity", "wush"])
@pytest.mark.parametrize("tokens", [256, 4096])
def test_a_run_takes_about_what_was_said(
    method: str, tokens: int, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.save(tiny_models.build("llama", **SIZES), tmp_path / "model")
    out, sizes = tmp_path / "out", [0]
    honest = mxtorq.writing._write

    def weighed(*arguments: object) -> object:
        written = honest(*arguments)  # type: ignore[arg-type]
        sizes.append(bytes_below(partial_folder(out)))
        return written

    monkeypatch.setattr(mxtorq.writing, "_write", weighed)
    told: list[Needs] = []
    recipe = Recipe(
        method=parse_method(method), calibration=str(story), calibration_tokens=tokens, seqlen=64
    )
    pipeline.quantize(str(model), out, recipe, device="cpu", announce=told.append)
    said = told[0].budgets[-1]
    assert said.name == "disk"
    noise = 2**17  # records, the tokenizer, headers
    assert max(sizes) <= said.needed + noise
    assert said.needed <= 1.5 * max(sizes)
