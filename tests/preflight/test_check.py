"""What does not fit is refused, with figures of what would."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mxtorq import pipeline
from mxtorq.config import Recipe, parse_method, parse_rounding
from mxtorq.errors import UsageError
from mxtorq.preflight import check, memory
from mxtorq.preflight.check import needs, require
from mxtorq.preflight.memory import budgets
from mxtorq.reports.needs import Needs, in_units


@pytest.fixture
def recipe(story: Path) -> Recipe:
    return Recipe(
        method=parse_method("wush"),
        rounding=parse_rounding("gptq"),
        calibration=str(story),
        calibration_tokens=2048,
        seqlen=64,
    )


def forecast(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    recipe: Recipe,
    out: Path,
    activation_memory: int | None = None,
    **machine: int,
) -> Needs:
    """Of a machine with so much free memory and disk, in a process that has nothing yet.

    Tensors are read piece by piece in buffers that are larger than these models; without them, the
    worst moment is a quantization's, as it is for larger models.
    """
    monkeypatch.setattr(memory, "_READING", 0)
    found = {"resident_memory": 0, "free_memory": 10**12, "free_disk": 10**12, **machine}
    for name, value in found.items():
        monkeypatch.setattr(check, name, lambda *_, value=value: value)
    source = pipeline.load_model(str(model), None, 0, "cpu", at_rest=True)
    windows = pipeline.calibrate(source, recipe)
    return needs(source, recipe, windows, {}, out, activation_memory)


def test_a_machine_that_is_large_enough_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_folders: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    found = forecast(monkeypatch, tiny_folders["llama"], recipe, tmp_path / "out")
    assert [budget.name for budget in found.budgets] == ["memory", "disk"]
    assert found.changes == ()
    assert found.seconds is None
    require(found)


def test_activations_stay_in_memory_only_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, tiny_folders: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    arguments = (monkeypatch, tiny_folders["llama"], recipe, tmp_path / "out")
    large = forecast(*arguments)
    activations = 2048 * 64 * 4
    assert large.budgets[0].parts["activations"] == activations
    rest = forecast(*arguments, 0).budgets[0].needed
    tight = forecast(*arguments, free_memory=rest + activations // 2)
    assert "activations" not in tight.budgets[0].parts
    assert tight.activation_memory < activations
    require(tight)


def test_too_little_memory_is_refused_with_what_would_do(
    monkeypatch: pytest.MonkeyPatch, tiny_folders: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    arguments = (monkeypatch, tiny_folders["llama"], recipe, tmp_path / "out")
    needed = forecast(*arguments, 10**9).budgets[0].needed
    found = forecast(*arguments, 10**9, free_memory=needed - 1)
    with pytest.raises(UsageError) as caught:
        require(found)
    text = str(caught.value)
    assert in_units(needed) in text
    assert "the largest part is" in text
    assert "--calibration-tokens 512 would need" in text
    assert "--calibration-tokens 128" not in text  # one is enough
    assert "--method hadamard --rounding rtn would need" in text
    # The figures are those of runs that are asked for like that.
    simple = replace(recipe, method=parse_method("hadamard"), rounding=parse_rounding("rtn"))
    asked = forecast(monkeypatch, tiny_folders["llama"], simple, tmp_path / "out", 10**9)
    figure = re.search(r"hadamard --rounding rtn would need ([\d.]+ \w+)", text)
    assert figure is not None
    assert figure[1] == in_units(asked.budgets[0].needed)


def test_activations_can_go_to_the_disk(
    monkeypatch: pytest.MonkeyPatch, tiny_folders: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    forecast(monkeypatch, tiny_folders["llama"], recipe, tmp_path / "out")
    source = pipeline.load_model(str(tiny_folders["llama"]), None, 0, "cpu", at_rest=True)
    windows = pipeline.calibrate(source, recipe)
    job = replace(check.job_of(source, recipe, windows, {}), tokens=10**9)
    machine = check.Machine(source, tmp_path / "out")
    machine.memory = 10**9
    short = check.compute_budget(job, machine, 10**15)
    assert not short.fits
    first = next(check.changes(job, machine, 10**15, short))
    spilled = check.compute_budget(job, machine, 0)
    expected = f"would need {in_units(spilled.needed)}"
    assert first == f"--activation-memory 0MB (activations on disk) {expected}"


def test_a_whole_model_that_is_too_large_can_stay_on_disk(
    monkeypatch: pytest.MonkeyPatch, tiny_folders: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    forecast(monkeypatch, tiny_folders["llama"], recipe, tmp_path / "out")
    source = pipeline.load_model(str(tiny_folders["llama"]), None, 0, "cpu", at_rest=True)
    windows = pipeline.calibrate(source, recipe)
    machine = check.Machine(source, tmp_path / "out")
    machine.memory = 10**9
    for changed, expected in (
        (replace(recipe, outliers="qwen3-0.6b"), "leaving --outliers away would need"),
        (replace(recipe, method=parse_method("quarot")), "--method hadamard --rounding gptq"),
    ):
        job = replace(check.job_of(source, changed, windows, {}), layers=10**6)
        short = check.compute_budget(job, machine, 0)
        assert not short.fits
        assert short.parts["the whole model"] > 10**9
        assert any(each.startswith(expected) for each in check.changes(job, machine, 0, short))


def test_nothing_is_proposed_that_would_not_fit(
    monkeypatch: pytest.MonkeyPatch, tiny_folders: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    arguments = (monkeypatch, tiny_folders["llama"], recipe, tmp_path / "out")
    with pytest.raises(UsageError, match="use a machine with more memory"):
        require(forecast(*arguments, free_memory=10))


def test_a_full_disk_is_refused_before_work(
    monkeypatch: pytest.MonkeyPatch, tiny_folders: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    arguments = (monkeypatch, tiny_folders["llama"], recipe, tmp_path / "out")
    needed = forecast(*arguments).budgets[-1].needed
    found = forecast(*arguments, free_disk=needed // 2)
    with pytest.raises(UsageError) as caught:
        require(found)
    assert "--calibration-tokens" in caught.value.todo
    assert f"a disk with {in_units(needed)} free" in caught.value.todo
    # What an earlier process has written counts as free.
    layers = tmp_path / "out.partial" / "layers"
    layers.mkdir(parents=True)
    (layers / "00000.safetensors").write_bytes(bytes(needed))
    (layers / "00000.json").write_text("{}")
    going_on = forecast(*arguments, free_disk=needed // 2)
    require(going_on)
    assert going_on.finished == 1


def test_an_accelerator_that_is_too_small_names_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tiny_folders: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    found = forecast(monkeypatch, tiny_folders["llama"], recipe, tmp_path / "out")
    source = pipeline.load_model(str(tiny_folders["llama"]), None, 0, "cpu", at_rest=True)
    windows = pipeline.calibrate(source, recipe)
    job = replace(check.job_of(source, recipe, windows, {}), device=torch.device("cuda"))
    machine = check.Machine(source, tmp_path / "out")
    machine.device = 10
    short = budgets(job, 0, 10**12, 10, False)[0]
    assert "--device cpu" in list(check.changes(job, machine, 0, short))
    assert found.device == "cpu"
