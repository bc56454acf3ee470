"""What each expert saw, against the tokens that a router sent there."""

import weakref
from collections.abc import Callable

import pytest
import torch

import hooked_experts
import tiny_models
from mxtorq.calibration.capture import LayerInput, capture_sites, first_layer_inputs
from mxtorq.calibration.experts import EXPERT_SAMPLE, capture_experts
from mxtorq.errors import ModelError
from mxtorq.formats import mxfp4
from mxtorq.models.family import Site

FAMILY = tiny_models.FAMILIES["qwen3_moe"]


@pytest.fixture(scope="module")
def first() -> tuple[torch.nn.Module, dict[str, Site], list[LayerInput]]:
    """A layer in float64, its sites, and inputs in several batches."""
    model = tiny_models.build("qwen3_moe").double()
    inputs = []
    for windows in tiny_models.tokens(12, 32).split(5):
        inputs += first_layer_inputs(model, FAMILY, windows)
    sites = {FAMILY.site_name(0, site): site for site in FAMILY.sites}
    return model.get_submodule("model.layers.0"), sites, inputs


def fresh(dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Site], list[LayerInput]]:
    """Likewise a layer that nobody else has."""
    model = tiny_models.build("qwen3_moe").to(dtype)
    inputs = []
    for windows in tiny_models.tokens(5, 32).split(2):
        inputs += first_layer_inputs(model, FAMILY, windows)
    sites = {FAMILY.site_name(0, site): site for site in FAMILY.sites}
    return model.get_submodule("model.layers.0"), sites, inputs


def identities(
    sites: dict[str, Site],
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    return {name: (lambda values: values) for name in sites}


def routed(layer: torch.nn.Module, inputs: list[LayerInput]) -> list[torch.Tensor]:
    """The MLP inputs of each expert's tokens, in the order of the text."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = layer.get_submodule("mlp.experts").register_forward_pre_hook(
        lambda module, args: seen.append((args[0], args[1]))
    )
    for item in inputs:
        layer(item.hidden, **item.arguments)
    hook.remove()
    rows, chosen = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return [rows[(chosen == expert).any(-1)] for expert in range(4)]


def of_experts(sites: dict[str, Site]) -> list[str]:
    return [name for name, site in sites.items() if site.experts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_hooks_on_every_linear(dtype: torch.dtype) -> None:
    """Also once the linears are replaced, and each time that a moment is asked for."""
    layer, sites, inputs = fresh(dtype)
    through = dict.fromkeys(sites, mxfp4.fake_quantize)
    expected = hooked_experts.capture(layer, sites, inputs, through)
    found = capture_experts(layer, FAMILY.experts, sites, inputs, through)
    for path in (path for name in found for path in sites[name].linears):
        layer.set_submodule(path, torch.nn.Identity())
    own = 0
    assert list(found) == list(expected)
    for name, parts in expected.items():
        for mine, theirs in zip(found[name], parts, strict=True):
            assert mine.tokens == theirs.tokens
            assert torch.equal(mine.sample, theirs.sample)
            assert (mine.hessian is None) == (theirs.hessian is None)
            if mine.hessian is not None and theirs.hessian is not None:
                own += 1
                assert torch.equal(mine.hessian(), theirs.hessian())
                assert torch.equal(mine.hessian(), mine.hessian())
    assert 2 < own < 8  # both happen


def test_what_is_kept_and_until_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of the list for a moment that can be asked for, and no moment before."""
    layer, sites, inputs = fresh(torch.float32)
    seen: list[weakref.ref[torch.Tensor]] = []
    kept: list[int] = []

    def watch(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        kept.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(args[0]))

    layer.get_submodule("mlp.experts").register_forward_pre_hook(watch)
    capture_experts(layer, FAMILY.experts, sites, inputs, {})
    assert kept == [0, 0, 0]

    seen.clear()
    kept.clear()
    with monkeypatch.context() as context:
        context.setattr("mxtorq.calibration.experts.SiteAccumulator", None)
        found = capture_experts(layer, FAMILY.experts, sites, inputs, identities(sites))
    assert kept == [0, 1, 2]
    gates = [
        weakref.ref(layer.get_submodule(f"mlp.experts.{number}.gate_proj").weight)
        for number in range(4)
    ]
    for path in sites["model.layers.0.gate_up_in"].linears:
        layer.set_submodule(path, torch.nn.Identity())
    assert all(reference() is not None for reference in seen)
    asking = [part.hessian is not None for part in found["model.layers.0.down_in"]]
    assert [gate() is not None for gate in gates] == asking
    assert set(asking) == {True, False}
    del found
    assert all(reference() is None for reference in (*seen, *gates))


def test_experts_are_left_out_of_the_pass(
    first: tuple[torch.nn.Module, dict[str, Site], list[LayerInput]],
) -> None:
    """But for samples: the first batches of each expert go through gate_proj and up_proj."""
    layer, sites, inputs = first
    calls: dict[str, int] = {}
    hooks = [
        layer.get_submodule(f"mlp.experts.{number}.{part}_proj").register_forward_hook(
            lambda *_, part=part: calls.update({part: calls.get(part, 0) + 1})
        )
        for number in range(4)
        for part in ("gate", "up", "down")
    ]
    tokens = [len(rows) for rows in routed(layer, inputs[:1])]
    for again in (inputs[:1], inputs):
        calls.clear()
        capture_experts(layer, FAMILY.experts, sites, again, identities(sites))
        assert calls == {"gate": 4, "up": 4}
    for hook in hooks:
        hook.remove()
    assert min(tokens) >= EXPERT_SAMPLE  # so one batch is enough for each


def test_a_site_whose_other_one_is_not_quantized(
    first: tuple[torch.nn.Module, dict[str, Site], list[LayerInput]],
) -> None:
    layer, sites, inputs = first
    whole = capture_experts(layer, FAMILY.experts, sites, inputs, identities(sites))
    for name in of_experts(sites):
        alone = {name: sites[name]}
        found = capture_experts(layer, FAMILY.experts, alone, inputs, identities(alone))
        assert list(found) == [name]
        for mine, theirs in zip(found[name], whole[name], strict=True):
            assert torch.equal(mine.sample, theirs.sample)
            if mine.hessian is not None and theirs.hessian is not None:
                assert torch.equal(mine.hessian(), theirs.hessian())


def test_inputs_that_leave_the_numbers_are_refused_by_name(
    first: tuple[torch.nn.Module, dict[str, Site], list[LayerInput]],
) -> None:
    layer, sites, inputs = first
    through = {name: (lambda values: values / 0) for name in sites}
    for name, parts in capture_experts(layer, FAMILY.experts, sites, inputs, through).items():
        ask = next(part.hessian for part in parts if part.hessian is not None)
        with pytest.raises(ModelError, match=name):
            ask()


def test_moments_and_samples_of_each_expert(
    first: tuple[torch.nn.Module, dict[str, Site], list[LayerInput]],
) -> None:
    layer, sites, inputs = first
    through = {name: (lambda values: 3 * values) for name in sites}
    found = capture_experts(layer, FAMILY.experts, sites, inputs, through)
    assert [name.rpartition(".")[2] for name in found] == ["gate_up_in", "down_in"]
    tokens = routed(layer, inputs)
    assert sum(map(len, tokens)) == 2 * 12 * 32
    for number, rows in enumerate(tokens):
        expert = layer.get_submodule(f"mlp.experts.{number}")
        inner = torch.nn.functional.silu(expert.gate_proj(rows)) * expert.up_proj(rows)
        for name, reached in zip(found, (rows, inner), strict=True):
            seen = found[name][number]
            assert seen.tokens == len(rows)
            assert torch.allclose(seen.sample, reached[:EXPERT_SAMPLE].float())
            if len(rows) < reached.shape[1]:
                assert seen.hessian is None
                continue
            moment = 9 * reached.T @ reached / len(rows)
            assert seen.hessian is not None
            assert torch.allclose(seen.hessian(), moment, rtol=1e-10, atol=1e-12)
    assert sum(part.hessian is not None for parts in found.values() for part in parts) > 2
    # All of them together are what the site's own statistics are of.
    pooled = capture_sites(layer, sites, inputs, seed=0)
    for name, parts in found.items():
        assert pooled[name].tokens == 12 * 32 * sites[name].passes
        moments = [part.hessian() * part.tokens for part in parts if part.hessian is not None]
        if len(moments) == len(parts):
            whole = sum(moments) / (9 * 2 * 12 * 32)
            assert torch.allclose(pooled[name].hessian, whole, rtol=1e-10, atol=1e-12)


def test_without_moments_and_without_tokens(
    first: tuple[torch.nn.Module, dict[str, Site], list[LayerInput]],
) -> None:
    """An expert that nothing was sent to has an empty sample of the right width."""
    _, sites, _ = first
    model = tiny_models.build("qwen3_moe")
    single = first_layer_inputs(model, FAMILY, tiny_models.tokens(1, 1))
    found = capture_experts(
        model.get_submodule("model.layers.0"), FAMILY.experts, sites, single, {}
    )
    for name, width in (("gate_up_in", 64), ("down_in", 96)):
        parts = found[f"model.layers.0.{name}"]
        assert sorted(part.tokens for part in parts) == [0, 0, 1, 1]
        assert all(part.sample.shape == (part.tokens, width) for part in parts)
        assert all(part.hessian is None for part in parts)


def test_layers_without_experts_cost_no_pass() -> None:
    family = tiny_models.FAMILIES["llama"]
    sites = {family.site_name(0, site): site for site in family.sites}
    assert capture_experts(torch.nn.Identity(), family.experts, sites, [], {}) == {}
