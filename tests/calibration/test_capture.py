"""Layer by layer equals the model's own forward pass, and statistics equal their definition."""

import pytest
import torch

import tiny_models
from mxtorq.calibration.capture import (
    LayerInput,
    advance_,
    batches,
    capture_hessians,
    capture_pairs,
    capture_sites,
    first_layer_inputs,
)
from mxtorq.calibration.statistics import SAMPLE_TOKENS, SiteAccumulator
from mxtorq.errors import ModelError
from mxtorq.models.family import SiteName
from tiny_models import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_called_one_by_one_are_the_forward_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxtorq.calibration.capture.BATCH_TOKENS", 64)
    family, model = FAMILIES[name], tiny_models.build(name).double()
    windows = tiny_models.tokens(5, 32)
    inputs = first_layer_inputs(model, family, windows)
    assert [len(item.hidden) for item in inputs] == [2, 2, 1]
    for layer in model.get_submodule(family.layers).children():
        advance_(layer, inputs)
    hidden = torch.cat([item.hidden for item in inputs])
    logits = model.get_submodule(family.head)(model.get_submodule(family.final_norm)(hidden))
    expected = torch.cat([model(input_ids=batch).logits for batch in batches(windows)])
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_the_moments_of_what_the_linears_read(name: str) -> None:
    family, model = FAMILIES[name], tiny_models.build(name).double()
    windows = tiny_models.tokens(4, 32)
    layer = model.get_submodule(f"{family.layers}.0")
    seen: dict[str, list[torch.Tensor]] = {site.name: [] for site in family.sites}
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda module, args, key=site.name: seen[key].append(args[0].flatten(0, -2))
        )
        for site in family.sites
        for path in (site.taps if site.experts else site.linears[-1:])
    ]
    model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    sites = {family.site_name(0, site): site for site in family.sites}
    statistics = capture_sites(layer, sites, first_layer_inputs(model, family, windows), seed=0)
    for full_name, site in sites.items():
        x = torch.cat(seen[site.name])
        found = statistics[full_name]
        assert found.tokens == len(x) == 128 * site.passes
        assert torch.allclose(found.hessian, x.T @ x / len(x), rtol=1e-12, atol=1e-14)
        assert torch.equal(found.sample, x.float())
        assert torch.equal(found.amax, x.abs().amax(0).float())
        assert found.name is site.name
        stacked = [layer.get_submodule(path).weight for path in site.linears]
        assert torch.equal(found.weight, torch.cat(stacked))


def test_hessians_of_changed_inputs() -> None:
    """Through a function of the site's own, as GPTQ after the rounding of activations wants."""
    family, model = FAMILIES["llama"], tiny_models.build("llama").double()
    layer = model.get_submodule(f"{family.layers}.0")
    sites = {site.name: site for site in family.sites}
    inputs = first_layer_inputs(model, family, tiny_models.tokens(2, 16))
    through = {name: (lambda values, by=at + 2.0: values * by) for at, name in enumerate(sites)}
    plain = capture_sites(layer, sites, inputs, seed=0)
    found = capture_hessians(layer, sites, inputs, through)
    for at, name in enumerate(sites):
        expected = plain[name].hessian * (at + 2.0) ** 2
        assert torch.allclose(found[name], expected, rtol=1e-12)


def test_pairs_are_the_moments_before_and_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    family, model = FAMILIES["llama"], tiny_models.build("llama")
    layer = model.get_submodule(f"{family.layers}.0")
    sites = {site.name: site for site in family.sites}
    windows = tiny_models.tokens(4, 32)
    plain = capture_sites(layer, sites, first_layer_inputs(model, family, windows), seed=0)
    monkeypatch.setattr("mxtorq.calibration.capture.BATCH_TOKENS", 64)  # several batches
    inputs = first_layer_inputs(model, family, windows)
    both = {
        name: lambda values: (2.0 * values, values.flip(-1).round(decimals=1)) for name in sites
    }
    found = capture_pairs(layer, sites, inputs, 40, both)
    for name in sites:
        x = plain[name].sample  # all of the 128 tokens
        one, two = 2.0 * x.double(), x.flip(-1).round(decimals=1).double()
        sides = [len(pair.cross) for pair in found[name]]
        assert sides == [40] * (x.shape[1] // 40) + [x.shape[1] % 40]
        for pair, a, b in zip(found[name], one.split(40, 1), two.split(40, 1), strict=True):
            for moment, left, right in zip(pair, (b, a), (b, b), strict=True):
                # Float32 sums of at most 128 products: each off by so much of the magnitudes' sum.
                bound = 129 * 2.0**-24 * (left.abs().T @ right.abs()) / len(x)
                assert ((moment - left.T @ right / len(x)).abs() <= bound).all()
            assert not torch.allclose(pair.cross, pair.cross.T)  # the sides are told apart


def test_pairs_that_became_infinite_are_refused() -> None:
    family, model = FAMILIES["llama"], tiny_models.build("llama")
    layer = model.get_submodule(f"{family.layers}.0")
    sites = {site.name: site for site in family.sites}
    inputs = first_layer_inputs(model, family, tiny_models.tokens(4, 32))
    both = {name: lambda values: (values, values / 0.0) for name in sites}
    with pytest.raises(ModelError, match="NaN or Inf within its tokens 0 to"):
        capture_pairs(layer, sites, inputs, 64, both)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # without a mask, and with one a window
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_a_part_of_a_batch_is_that_of_its_first_windows(name: str, attention: str) -> None:
    family, model = FAMILIES[name], tiny_models.build(name)
    model.set_attn_implementation(attention)
    layer = model.get_submodule(f"{family.layers}.0")
    ids = tiny_models.tokens(8, 8)
    (whole,) = first_layer_inputs(model, family, ids)
    (few,) = first_layer_inputs(model, family, ids[:3])
    part = whole.first(3 * 8 + 7)
    assert torch.equal(part.hidden, few.hidden)
    outputs = [layer(item.hidden, **item.arguments) for item in (part, few)]
    assert torch.equal(*(each[0] if isinstance(each, tuple) else each for each in outputs))
    assert len(whole.first(1).hidden) == 1


def test_only_what_every_window_shares_is_cut() -> None:
    each, positions = torch.arange(12.0).expand(4, 1, 12), torch.arange(16.0).view(4, 4)
    arguments = {"mask": each, "pair": (positions, each), "flag": True, "line": torch.arange(4)}
    part = LayerInput(torch.zeros(4, 4, 2), arguments).first(8).arguments
    assert torch.equal(part["mask"], each[:2])
    assert torch.equal(part["pair"][1], each[:2])
    # As many positions as windows: rows that differ are not those of windows.
    assert torch.equal(part["pair"][0], positions)
    assert torch.equal(part["line"], torch.arange(4))
    assert part["flag"] is True


def test_no_hook_stays_behind() -> None:
    family, model = FAMILIES["llama"], tiny_models.build("llama")
    layer = model.get_submodule(f"{family.layers}.0")
    sites = {family.site_name(0, site): site for site in family.sites}
    inputs = first_layer_inputs(model, family, tiny_models.tokens(1, 16))
    capture_sites(layer, sites, inputs, seed=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_sample_does_not_depend_on_the_batches() -> None:
    rows = torch.randn(3 * SAMPLE_TOKENS, 32)
    whole, parts = (SiteAccumulator("s", 32, len(rows), seed=1) for _ in range(2))
    whole.add(rows)
    for part in rows.split(100):
        parts.add(part[None])
    one, two = (each.finish(SiteName.DOWN_IN, ()) for each in (whole, parts))
    assert len(one.sample) == SAMPLE_TOKENS
    assert torch.equal(one.sample, two.sample)
    # Float32 sums of at most all rows: each off by so much of the sum of magnitudes.
    bound = len(rows) * 2.0**-24 * (rows.abs().double().T @ rows.abs().double()) / len(rows)
    assert ((one.hessian - two.hessian).abs() <= 2.01 * bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_activations_name_their_site(bad: float) -> None:
    accumulator = SiteAccumulator("model.layers.7.down_in", 32, 10, seed=0)
    rows = torch.zeros(10, 32)
    rows[4, 3] = bad
    with pytest.raises(ModelError, match=r"model\.layers\.7\.down_in"):
        accumulator.add(rows)
