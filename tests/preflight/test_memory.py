"""Formulas beside what they stand for: real tensors of a small model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mxtorq import pipeline
from mxtorq.calibration.capture import capture_pairs, capture_sites
from mxtorq.config import Recipe, parse_method, parse_rounding
from mxtorq.loading.at_rest import staged_
from mxtorq.loading.source import Source
from mxtorq.preflight import memory
from mxtorq.preflight.job import Job, job_of
from mxtorq.quantization import first_inputs
from mxtorq.reports.needs import Budget
from mxtorq.rounding.correction import CORRECTION_BLOCK
from tiny_models import FAMILIES


def recipe(story: Path, method: str = "identity", rounding: str = "rtn") -> Recipe:
    return Recipe(
        method=parse_method(method),
        rounding=parse_rounding(rounding),
        calibration=str(story),
        calibration_tokens=512,
        seqlen=64,
    )


def loaded(
    folder: Path, settings: Recipe, at_rest: bool = True
) -> tuple[Source, torch.Tensor, Job]:
    source = pipeline.load_model(str(folder), None, 0, "cpu", at_rest=at_rest)
    windows = pipeline.calibrate(source, settings)
    return source, windows.ids, job_of(source, settings, windows, {})


def nbytes(tensors: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_activations_and_second_moments_are_as_large_as_they_are(
    family: str, tiny_folders: dict[str, Path], story: Path
) -> None:
    settings = recipe(story, "wush", "gptq")
    source, ids, job = loaded(tiny_folders[family], settings)
    inputs = list(first_inputs(source, ids))
    assert job.activations == nbytes(item.hidden for item in inputs)
    assert job.batches == len(inputs)
    _, layer = next(staged_(source))
    assert memory.layer(job) == nbytes(layer.parameters())
    sites = {site.name: site for site in FAMILIES[family].sites}
    found = capture_sites(layer, sites, inputs, 0)
    assert memory.moments(job) == nbytes(each.hessian for each in found.values())
    assert memory.moments(replace(job, recipe=recipe(story))) == 0
    both = {name: lambda values: (values, values) for name in sites}
    pairs = capture_pairs(layer, sites, inputs, CORRECTION_BLOCK, both)
    corrected = recipe(story, "wush", "gptq:inputs=corrected")
    more = nbytes(part for blocks in pairs.values() for pair in blocks for part in pair)
    assert memory.moments(replace(job, recipe=corrected)) == memory.moments(job) + more
    chosen = recipe(story, "mxtorq", "gptq")
    assert memory.moments(replace(job, recipe=chosen)) == 2 * memory.moments(job)
    experts = [site for site in FAMILIES[family].sites if site.experts]
    hessians = [nbytes([found[site.name].hessian]) for site in experts]
    of_experts = max(hessians) + job.activations if hessians else 0  # one at a time
    assert memory.expert_moments(job) == of_experts
    # What a site stacks is what its linears hold.
    linears = [layer.get_submodule(path) for site in sites.values() for path in site.linears]
    weights = [linear.weight for linear in linears if isinstance(linear, nn.Linear)]
    assert job.quantized == sum(weight.numel() for weight in weights)
    assert max(site.largest for site in job.sites) == max(w.numel() for w in weights)


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # an own head, and a tied one
def test_a_model_in_memory_is_as_large_as_it_is(
    family: str, tiny_folders: dict[str, Path], story: Path
) -> None:
    source, _, job = loaded(tiny_folders[family], recipe(story), at_rest=False)
    assert memory.whole_model(job) == nbytes(source.model.parameters())
    assert job.whole
    _, _, resting = loaded(tiny_folders[family], recipe(story))
    assert not resting.whole
    assert replace(resting, recipe=recipe(story, "quarot")).whole


def test_a_model_in_memory_is_not_counted_twice(tiny_folders: dict[str, Path], story: Path) -> None:
    _, _, job = loaded(tiny_folders["llama"], recipe(story), at_rest=False)
    resident = 10**9 + memory.whole_model(job)
    (found,) = memory.budgets(job, resident, 0, None, True)
    assert found.parts["libraries and text"] == 10**9 + memory._LATER
    assert found.parts["the whole model"] == memory.whole_model(job)
    assert found.free == resident


def test_the_need_is_that_of_the_worst_phase(tiny_folders: dict[str, Path], story: Path) -> None:
    _, _, job = loaded(tiny_folders["llama"], recipe(story, "wush", "gptq"))
    phases = memory.phases(job, True)
    (found,) = memory.budgets(job, 0, 0, None, True)
    totals = {p.name: sum(p.compute.values()) + sum(p.host.values()) for p in phases}
    assert found.needed == max(totals.values()) + memory._LATER
    assert totals[found.phase] == max(totals.values())
    spilled = memory.budgets(replace(job, tokens=10**9), 0, 0, None, False)[0]
    assert spilled.needed < memory.budgets(replace(job, tokens=10**9), 0, 0, None, True)[0].needed


def on_device(job: Job) -> list[Budget]:
    return memory.budgets(replace(job, device=torch.device("cuda")), 1000, 100, 10, True)


def test_an_accelerator_has_a_budget_of_its_own(tiny_folders: dict[str, Path], story: Path) -> None:
    _, _, job = loaded(tiny_folders["llama"], recipe(story, "wush", "gptq"))
    device, host = on_device(job)
    assert (device.name, device.free) == ("device memory", 10)
    assert (host.name, host.free) == ("memory", 1100)
    assert "second moments" in device.parts
    assert "libraries and text" not in device.parts
    assert host.parts["libraries and text"] == 1000 + memory._LATER
    assert memory.layer(replace(job, device=torch.device("cuda"))) == 2 * job.layer
