"""What each expert saw, against the tokens that a router sent there."""

import pytest
import torch

import tiny_models
from mxtorq.calibration.capture import LayerInput, capture_sites, first_layer_inputs
from mxtorq.calibration.experts import EXPERT_SAMPLE, capture_experts
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


def test_moments_and_samples_of_each_expert(
    first: tuple[torch.nn.Module, dict[str, Site], list[LayerInput]],
) -> None:
    layer, sites, inputs = first
    through = {name: (lambda values: 3 * values) for name in sites}
    found = capture_experts(layer, sites, inputs, through)
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
            assert torch.allclose(seen.hessian, moment, rtol=1e-10, atol=1e-12)
    assert sum(part.hessian is not None for parts in found.values() for part in parts) > 2
    # All of them together are what the site's own statistics are of.
    pooled = capture_sites(layer, sites, inputs, seed=0)
    for name, parts in found.items():
        assert pooled[name].tokens == 12 * 32 * sites[name].passes
        if all(part.hessian is not None for part in parts):
            whole = sum(part.hessian * part.tokens for part in parts) / (9 * 2 * 12 * 32)
            assert torch.allclose(pooled[name].hessian, whole, rtol=1e-10, atol=1e-12)


def test_without_moments_and_without_tokens(
    first: tuple[torch.nn.Module, dict[str, Site], list[LayerInput]],
) -> None:
    """An expert that nothing was sent to has an empty sample of the right width."""
    _, sites, _ = first
    model = tiny_models.build("qwen3_moe")
    single = first_layer_inputs(model, FAMILY, tiny_models.tokens(1, 1))
    found = capture_experts(model.get_submodule("model.layers.0"), sites, single, {})
    for name, width in (("gate_up_in", 64), ("down_in", 96)):
        parts = found[f"model.layers.0.{name}"]
        assert sorted(part.tokens for part in parts) == [0, 0, 1, 1]
        assert all(part.sample.shape == (part.tokens, width) for part in parts)
        assert all(part.hessian is None for part in parts)


def test_layers_without_experts_cost_no_pass() -> None:
    family = tiny_models.FAMILIES["llama"]
    sites = {family.site_name(0, site): site for site in family.sites}
    assert capture_experts(torch.nn.Identity(), sites, [], {}) == {}
