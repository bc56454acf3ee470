"""Fusing keeps the function: logits in float64, for every family and every transform."""

import pytest
import torch

import tiny_models
from mxtorq.calibration.capture import advance_, capture_sites, first_layer_inputs
from mxtorq.config import parse_method
from mxtorq.errors import ModelError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import quantize
from mxtorq.models import FAMILIES
from mxtorq.surgery.fuse import quantize_site_, require_fit, transform_site_
from mxtorq.surgery.linear import MXFP4Linear
from mxtorq.transforms import METHODS
from mxtorq.transforms.rotation import Identity

SPECS = [*METHODS, "torq:levels=inter", "torq:levels=intra", "torq:angle=mean:s_step=floor"]
EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_before_and_after_fusing(name: str, spec: str) -> None:
    family, model = FAMILIES[name], tiny_models.build_fp64(name)
    windows = tiny_models.tokens(4, 64)
    changed = tiny_models.build_fp64(name)
    inputs = first_layer_inputs(changed, family, windows)
    widest = linears = 0
    for index, layer in enumerate(changed.get_submodule(family.layers).children()):
        sites = {family.site_name(index, site): site for site in family.sites}
        statistics = capture_sites(layer, sites, inputs, seed=0)
        for full_name, site in sites.items():
            transform = parse_method(spec).fit(statistics[full_name], 0)
            transform_site_(layer, site, transform)
            widest, linears = max(widest, transform.width), linears + len(site.linears)
        advance_(layer, inputs)
    before, after = model(input_ids=windows).logits, changed(input_ids=windows).logits
    # Each linear adds 4 d eps of its inputs' and weights' norms (transforms on both sides and the
    # product); norms and residuals carry that on with a factor of order one a layer.
    bound = 4 * widest * EPS * linears * before.abs().max()
    assert (after - before).abs().max() <= bound
    if spec != "identity":
        assert not torch.equal(after, before)  # something was changed


def test_quantizing_a_site_replaces_exactly_its_linears() -> None:
    family, model = FAMILIES["llama"], tiny_models.build("llama")
    layer = model.get_submodule(f"{family.layers}.0")
    site = family.sites[0]
    weights = {path: quantize(layer.get_submodule(path).weight) for path in site.linears}
    bias = layer.get_submodule(site.linears[0]).bias.clone()
    quantize_site_(layer, site, Identity(64), weights, ScaleRule.FLOOR)
    replaced = [path for path, module in layer.named_modules() if isinstance(module, MXFP4Linear)]
    assert sorted(replaced) == sorted(site.linears)
    assert torch.equal(layer.get_submodule(site.linears[0]).bias, bias)


def test_unfit_sites_are_refused_by_name_or_listed() -> None:
    model, family = tiny_models.build("llama", intermediate_size=172), FAMILIES["llama"]
    with pytest.raises(
        ModelError, match=r"model\.layers\.0\.mlp\.down_proj: 172 .* 2 of 8"
    ) as caught:
        require_fit(model, family, allow_unfit=False)
    assert "--allow-unfit" in caught.value.todo
    unfit = require_fit(model, family, allow_unfit=True)
    assert unfit == {"model.layers.0.down_in": 172, "model.layers.1.down_in": 172}
    assert require_fit(tiny_models.build("llama"), family, allow_unfit=False) == {}


def test_a_model_without_any_fitting_site_is_refused_in_any_case() -> None:
    changes = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    model = tiny_models.build("llama", **changes, intermediate_size=100)
    with pytest.raises(ModelError, match="another model"):
        require_fit(model, FAMILIES["llama"], allow_unfit=True)
