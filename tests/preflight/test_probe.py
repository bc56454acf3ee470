"""A probe does what a run does, to something that nobody sees afterwards."""

import hashlib
from pathlib import Path

import pytest
import torch

from mxtorq import pipeline
from mxtorq.calibration.capture import LayerInput
from mxtorq.config import Recipe, parse_method, parse_rounding
from mxtorq.preflight.probe import Clocked, Pace, measure, with_one_layer
from mxtorq.reports.needs import Needs


def settings(story: Path) -> Recipe:
    return Recipe(
        method=parse_method("torq"),
        rounding=parse_rounding("gptq"),
        calibration=str(story),
        calibration_tokens=512,
        seqlen=64,
    )


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_a_probe_changes_no_byte_of_the_result(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    told: list[Needs] = []
    for name, announce in (("one", None), ("two", told.append)):
        pipeline.quantize(
            str(tiny_folders["qwen3"]),
            tmp_path / name,
            settings(story),
            device="cpu",
            announce=announce,
        )
    assert told[0].seconds is not None
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize("at_rest", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_probe_leaves_the_model_as_it_was(
    family: str, at_rest: bool, tiny_folders: dict[str, Path], story: Path
) -> None:
    source = pipeline.load_model(str(tiny_folders[family]), None, 0, "cpu", at_rest=at_rest)
    windows = pipeline.calibrate(source, settings(story))
    before = {name: id(part) for name, part in source.model.named_parameters()}
    modules = {name: id(part) for name, part in source.model.named_modules()}
    values = {name: part.clone() for name, part in source.model.named_parameters()}
    pace = measure(source, settings(story), windows, {})
    assert min(pace.once, pace.batch, pace.forward) > 0
    assert {name: id(part) for name, part in source.model.named_parameters()} == before
    assert {name: id(part) for name, part in source.model.named_modules()} == modules
    if not at_rest:
        for name, part in source.model.named_parameters():
            assert torch.equal(part, values[name])


def test_only_the_first_layer_is_copied(tiny_folders: dict[str, Path]) -> None:
    source = pipeline.load_model(str(tiny_folders["qwen3"]), None, 0, "cpu")
    copied = with_one_layer(source)
    layers = f"{source.family.layers}."
    for name, part in copied.model.named_parameters():
        assert (part is source.model.get_parameter(name)) == (not name.startswith(layers)), name
    assert len(list(copied.model.get_submodule(source.family.layers).children())) == 1
    assert len(list(source.model.get_submodule(source.family.layers).children())) == 2


def test_the_time_of_each_pass_is_known() -> None:
    inputs = Clocked([LayerInput(torch.zeros(1, 2, 3), {}) for _ in range(2)], torch.device("cpu"))
    assert sum(item.tokens for item in inputs) == 4
    assert inputs[0].tokens == 2
    assert [len(times) for times in inputs.passes] == [2]
    assert Pace(once=10.0, batch=2.0, forward=1.0).seconds(layers=3, batches=5) == 63.0
