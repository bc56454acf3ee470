"""Rescaling by powers of two changes no bit of the function and gives the profile's spread."""

import copy

import pytest
import torch

import tiny_models
from mxtorq.calibration.capture import capture_sites, first_layer_inputs
from mxtorq.errors import ModelError, UsageError
from mxtorq.models.family import SiteName
from mxtorq.surgery.outliers import add_outliers_, channel_factors, profiles
from mxtorq.surgery.rescale import rescale_site_, source_width
from tiny_models import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("profile", profiles())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_function_is_kept_to_the_bit(name: str, profile: str, dtype: torch.dtype) -> None:
    model = tiny_models.build(name).to(dtype)
    changed = copy.deepcopy(model)
    add_outliers_(changed, FAMILIES[name], profile, seed=0)
    ids = tiny_models.tokens(2, 16)
    assert torch.equal(model(input_ids=ids).logits, changed(input_ids=ids).logits)
    assert any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), changed.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_each_site_s_channels_are_scaled_by_the_factors(name: str) -> None:
    family, model = FAMILIES[name], tiny_models.build(name)
    inputs = first_layer_inputs(model, family, tiny_models.tokens(1, 16))
    layer = model.get_submodule(f"{family.layers}.0")
    sites = {site.name: site for site in family.sites}
    before = capture_sites(layer, sites, inputs, seed=0)
    factors = {}
    for key, site in sites.items():
        width = source_width(layer, site)
        factors[key] = torch.exp2(torch.arange(width) % 5 - 2.0)
        rescale_site_(layer, site, factors[key], layer.self_attn.head_dim)
    after = capture_sites(layer, sites, inputs, seed=0)
    for key in sites:
        ratio = (torch.diagonal(after[key].hessian) / torch.diagonal(before[key].hessian)).sqrt()
        if key == "o_in":  # two query heads read each key/value head
            expected = factors[key].view(2, 1, -1).expand(2, 2, -1).reshape(-1)
        else:
            expected = factors[key]
        assert torch.equal(ratio.float(), expected)


def test_factors_follow_the_profile() -> None:
    for name, profile in profiles().items():
        for site in SiteName:
            factors = channel_factors(profile, 0.5, site, 256)
            layer = profile["layers"][len(profile["layers"]) // 2][site]
            assert torch.equal(factors, torch.exp2(torch.log2(factors).round())), name
            assert factors.median() in (0.5, 1.0, 2.0)
            assert factors.max() / max(layer) <= 2**0.5 * 1.0001
            assert factors.max() / max(layer) >= 2**-0.5 * 0.9999


def test_unknown_profiles_and_unfit_factors_are_refused() -> None:
    model = tiny_models.build("llama")
    with pytest.raises(UsageError, match=r"llama-3\.2-1b, qwen3-0\.6b"):
        add_outliers_(model, FAMILIES["llama"], "gpt-2", seed=0)
    layer = model.get_submodule("model.layers.0")
    with pytest.raises(ModelError, match="qkv_in"):
        rescale_site_(layer, FAMILIES["llama"].sites[0], torch.ones(7), 16)
