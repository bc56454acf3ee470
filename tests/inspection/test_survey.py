"""A survey measures what reaches each site, harm is one site alone, and models stay as they are."""

import math

import pytest
import torch

import tiny_models
from mxtorq.calibration.capture import first_layer_inputs
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.inspection.harm import harms
from mxtorq.inspection.measures import picture
from mxtorq.inspection.survey import SurveyedLayer, survey
from mxtorq.kernels.dispatch import fake_quantize
from mxtorq.loading.source import Source
from mxtorq.transforms import METHODS, Hadamard

NAMES = ("identity", "hadamard")
WINDOWS = tiny_models.tokens(3, 24)


def source_of(family: str) -> Source:
    return Source(
        name=family,
        model=tiny_models.build(family),
        tokenizer=None,
        family=tiny_models.FAMILIES[family],
        device=torch.device("cpu"),
    )


def surveyed(source: Source, *, replacements: bool = False) -> list[SurveyedLayer]:
    family = source.family
    sites = [family.site_name(index, site) for index in range(2) for site in family.sites]
    methods = {name: METHODS[name]() for name in NAMES}
    return list(
        survey(source, WINDOWS, methods, sites, ScaleRule.EVEN, 0, replacements=replacements)
    )


def test_pictures_are_those_of_what_the_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs recorded by hooks on a plain forward pass, weights read off the module."""
    monkeypatch.setattr("mxtorq.calibration.capture.BATCH_TOKENS", 48)
    source = source_of("llama")
    layers = surveyed(source)
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> object:
        return lambda module, args: seen.__setitem__(name, args[0])

    handles = []
    for index in range(2):
        for site in source.family.sites:
            path = source.family.linear_name(index, site.linears[0])
            linear = source.model.get_submodule(path)
            name = source.family.site_name(index, site)
            handles.append(linear.register_forward_pre_hook(hook(name)))  # type: ignore[arg-type]
    for window in WINDOWS.split(2):
        before = dict(seen)
        source.model(input_ids=window)
        for name, earlier in before.items():
            seen[name] = torch.cat([earlier.flatten(0, 1), seen[name].flatten(0, 1)])
    for handle in handles:
        handle.remove()

    for index, layer in enumerate(layers):
        for site in source.family.sites:
            name = source.family.site_name(index, site)
            weights = torch.cat(
                [
                    source.model.get_submodule(source.family.linear_name(index, path)).weight
                    for path in site.linears
                ]
            )
            before = layer.pairs[name, "identity"]
            # The same batches in the same arithmetic, so the very same numbers reach the site.
            assert before.inputs.code_counts == picture(seen[name], ScaleRule.EVEN).code_counts
            whole = picture(weights.detach(), ScaleRule.EVEN)  # not linear by linear
            assert before.weights.code_counts == whole.code_counts
            assert before.weights.scale_exponents == whole.scale_exponents
            after = layer.pairs[name, "hadamard"]
            assert after.weights.rows == len(weights)
            assert after.inputs.code_counts != before.inputs.code_counts
            longest = layer.lengths[name][0]
            norms = seen[name].norm(dim=-1)
            assert longest.index == int(norms.argmax())


def test_residual_lengths_are_those_behind_the_layer() -> None:
    source = source_of("qwen3")
    layers = surveyed(source)
    states = source.model(input_ids=WINDOWS, output_hidden_states=True).hidden_states[1]
    norms = states.flatten(0, 1).norm(dim=-1)
    first = layers[0].residual[0]
    assert first.index == int(norms.argmax())
    # Float32 norms of 64 terms on both sides.
    assert math.isclose(first.ratio, float(norms.max() / norms.median()), rel_tol=1e-4)


def test_experts_are_measured_and_name_no_tokens() -> None:
    source = source_of("qwen3_moe")
    layer = surveyed(source)[0]
    pair = layer.pairs["model.layers.0.down_in", "identity"]
    assert pair.inputs.rows == 3 * 24 * 2  # two experts for each token
    assert pair.weights.rows == 4 * 64
    assert pair.output_error is None
    assert "model.layers.0.down_in" not in layer.lengths
    assert "model.layers.0.qkv_in" in layer.lengths


def test_a_survey_leaves_the_model_as_it_is() -> None:
    source = source_of("llama")
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    logits = source.model(input_ids=WINDOWS).logits
    layers = surveyed(source, replacements=True)
    after = source.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(source.model(input_ids=WINDOWS).logits, logits)
    assert not any(module._forward_pre_hooks for module in source.model.modules())
    kept = {key: made for layer in layers for key, made in layer.replacements.items()}
    harms(source.model, source.model, kept, WINDOWS)
    assert torch.equal(source.model(input_ids=WINDOWS).logits, logits)


def test_harm_is_that_of_one_site_alone() -> None:
    """Against a copy whose linear is written by hand: rounded input times rounded weight."""
    source = source_of("llama")
    layers = surveyed(source, replacements=True)
    kept = {key: made for layer in layers for key, made in layer.replacements.items()}
    steps: list[tuple[int, int]] = []
    found = harms(source.model, source.model, kept, WINDOWS, lambda *step: steps.append(step))
    assert [each.kl for each in found] == sorted((each.kl for each in found), reverse=True)
    assert len(found) == 16
    assert (steps[0], steps[-1]) == ((0, 16), (16, 16))

    class ByHand(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            transform = Hadamard().fit(statistics, 0)
            weight = transform.fuse(linear.weight.double()).float()
            self.transform, self.bias = transform, linear.bias
            self.rounded = fake_quantize(weight, ScaleRule.EVEN)

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            rounded = fake_quantize(self.transform.apply(values), ScaleRule.EVEN)
            return torch.nn.functional.linear(rounded, self.rounded, self.bias)

    from mxtorq.calibration.capture import capture_sites

    family = source.family
    site = family.sites[3]
    layer = source.model.get_submodule("model.layers.0")
    inputs = first_layer_inputs(source.model, family, WINDOWS)
    statistics = capture_sites(layer, {"s": site}, inputs, 0, hessians=False)["s"]
    copied = tiny_models.build("llama")
    path = "model.layers.0.mlp.down_proj"
    copied.set_submodule(path, ByHand(copied.get_submodule(path)))  # type: ignore[arg-type]
    p, q = (
        each(input_ids=WINDOWS).logits[:, :-1].double().log_softmax(-1)
        for each in (source.model, copied)
    )
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    (harm,) = (
        each
        for each in found
        if each.site == "model.layers.0.down_in" and each.method == "hadamard"
    )
    measured = layers[0].pairs["model.layers.0.down_in", "hadamard"].output_error
    sample = statistics.sample
    plain, mine = (each.get_submodule(path)(sample).double() for each in (source.model, copied))
    power = (plain - source.model.get_submodule(path).bias.double()).square().sum()
    # Outputs of 96 float32 terms, of which the error is more than a hundredth.
    assert measured is not None
    assert math.isclose(measured, float((plain - mine).square().sum() / power), rel_tol=1e-3)
    # Float32 log-probabilities of magnitude below 64, weighted by probabilities that sum to 1.
    assert abs(harm.kl - expected) <= 2 * 64 * 320 * torch.finfo(torch.float32).eps
    assert expected > 1e-3
    assert harm.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
