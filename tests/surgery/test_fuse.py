"""Fusing keeps the function: logits in float64, for every family and every transform."""

import pytest
import torch

import oracles
import tiny_models
from mxtorq.calibration.capture import advance_, capture_sites, first_layer_inputs
from mxtorq.config import parse_method
from mxtorq.errors import FormatError, ModelError
from mxtorq.formats import scales
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import quantize
from mxtorq.formats.scales import NonOCPScale
from mxtorq.models.family import SiteName
from mxtorq.surgery.fuse import quantize_site_, require_fit, transform_site_
from mxtorq.surgery.linear import MXFP4Linear
from mxtorq.surgery.network import network
from mxtorq.surgery.offline import apply_offline_
from mxtorq.surgery.rescale import is_norm, merge_diagonal_
from mxtorq.transforms import METHODS
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.rotation import Identity
from tiny_models import FAMILIES

SPECS = [
    *(name for name in METHODS if name not in ("brq", "duquant", "mxtorq", "spinquant")),
    "brq:size=16",
    "duquant:block=32",
    "duquant++:shared=false",
    "mxtorq:candidates=layer-smooth/hadamard+torq-inter/layer-32+perq-order/layer-32",
    "smoothquant:sites=all",
    "spinquant:steps=2",
    "torq:levels=inter",
    "torq:levels=intra",
    "torq:angle=mean:s_step=floor",
    "wush:curvature=block",
]
EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_before_and_after_fusing(name: str, spec: str) -> None:
    """Everything that is done to a model short of rounding: rotations merged into the whole model,
    diagonals merged into their sources, transforms fused."""
    family, model = FAMILIES[name], tiny_models.build_fp64(name)
    method = parse_method(spec)
    windows = tiny_models.tokens(4, 64)
    changed = tiny_models.build_fp64(name)
    rotations = method.rotations(network(changed, family, windows), 0)
    apply_offline_(changed, family, rotations)
    inputs = first_layer_inputs(changed, family, windows)
    widest, linears, condition = 0, 0, 1.0
    for index, layer in enumerate(changed.get_submodule(family.layers).children()):
        sites = {family.site_name(index, site): site for site in family.sites}
        statistics = capture_sites(layer, sites, inputs, seed=0)
        for full_name, site in sites.items():
            seen = statistics[full_name]
            transform = method.fit(oracles.judged(seen) if method.chooses else seen, 0)
            condition = max(condition, torch.linalg.cond(transform.matrix()).item())
            transform, _ = merge_diagonal_(layer, site, transform, torch.float64)
            transform_site_(layer, site, transform)
            widest, linears = max(widest, transform.width), linears + len(site.linears)
        advance_(layer, inputs)
    before, after = model(input_ids=windows).logits, changed(input_ids=windows).logits
    # Each linear adds 4 d eps of its inputs' and weights' norms (transforms on both sides and the
    # product), times the condition of what is not orthogonal; norms and residuals carry that on
    # with a factor of order one a layer.
    bound = 4 * widest * EPS * condition * linears * before.abs().max()
    assert (after - before).abs().max() <= bound
    if spec != "identity":
        assert not torch.equal(after, before)  # something was changed


@pytest.mark.parametrize("name", FAMILIES)
def test_a_diagonal_is_merged_into_its_source(name: str) -> None:
    """Nothing stays online but o_in of grouped-query attention and what a router reads, and a
    norm's gain is a BF16 number although the factors are not: the readers absorb what its rounding
    changed."""
    family, model = FAMILIES[name], tiny_models.build_fp64(name)
    ids = tiny_models.tokens(2, 16)
    before = model(input_ids=ids).logits
    draw = torch.Generator().manual_seed(0)
    for layer in model.get_submodule(family.layers).children():
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gain = layer.get_submodule(norm).weight
            gain.copy_(gain.bfloat16())
        for site in family.sites:
            width = layer.get_submodule(site.linears[0]).in_features
            diagonal = Diagonal(torch.rand(width, dtype=torch.float64, generator=draw) + 0.5)
            kept = torch.bfloat16 if is_norm(layer, site.source) else torch.float64
            rest, applied = merge_diagonal_(layer, site, diagonal, kept)
            if site.name == "o_in" or site.kept_readers:
                assert rest is diagonal
                assert applied is None
                continue
            assert rest.kind == "identity"
            if kept == torch.bfloat16:
                gain = layer.get_submodule(site.source).weight
                assert torch.equal(gain, gain.bfloat16().double())
                assert not torch.equal(applied, diagonal.factors)
                # The nearest BF16 number is within half a step of 2^-8.
                assert (applied / diagonal.factors - 1).abs().max() <= 2**-8
    after = model(input_ids=ids).logits
    unchanged = tiny_models.build_fp64(name)
    for layer in unchanged.get_submodule(family.layers).children():
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gain = layer.get_submodule(norm).weight
            gain.copy_(gain.bfloat16())
    before = unchanged(input_ids=ids).logits
    assert (after - before).abs().max() <= 100 * 96 * EPS * before.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_smoothed_o_in_takes_the_bias_of_v_proj_along(name: str) -> None:
    """Where every value head is read once, the factors go into v_proj's rows and its bias."""
    family, model = FAMILIES[name], tiny_models.build_fp64(name, num_key_value_heads=4)
    ids = tiny_models.tokens(2, 16)
    before = model(input_ids=ids).logits
    draw = torch.Generator().manual_seed(0)
    factors = torch.rand(64, dtype=torch.float64, generator=draw) + 0.5
    layers = list(model.get_submodule(family.layers).children())
    for layer in layers:
        values = layer.get_submodule("self_attn.v_proj")
        weight, bias = values.weight.clone(), values.bias.clone()
        site = family.site(SiteName.O_IN)
        rest, applied = merge_diagonal_(layer, site, Diagonal(factors), torch.float64)
        assert rest.kind == "identity"
        assert torch.equal(applied, factors)
        assert torch.equal(values.weight, weight * factors[:, None])
        assert torch.equal(values.bias, bias * factors)
    after = model(input_ids=ids).logits
    assert (after - before).abs().max() <= 100 * 96 * EPS * before.abs().max()
    layers[0].get_submodule("self_attn.v_proj").bias.div_(factors)
    assert (model(input_ids=ids).logits - before).abs().max() > 1e-4 * before.abs().max()


def test_non_ocp_scales_run_and_kinds_do_not_mix() -> None:
    family, model = FAMILIES["llama"], tiny_models.build("llama")
    layer = model.get_submodule(f"{family.layers}.0")
    site = family.sites[-1]
    (path,) = site.linears
    linear = layer.get_submodule(path)
    codes = scales.quantize(linear.weight, NonOCPScale.LOG256)
    with pytest.raises(FormatError, match="both MXFP4 or both outside"):
        quantize_site_(layer, site, Identity(96), {path: codes}, ScaleRule.FLOOR)
    with pytest.raises(FormatError, match="both MXFP4 or both outside"):
        strict = {path: quantize(linear.weight)}
        quantize_site_(layer, site, Identity(96), strict, NonOCPScale.LOG256)
    quantize_site_(layer, site, Identity(96), {path: codes}, NonOCPScale.LOG256)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    rounded = scales.fake_quantize(x, NonOCPScale.LOG256)
    expected = torch.nn.functional.linear(rounded, scales.dequantize(codes), linear.bias)
    assert torch.equal(layer.get_submodule(path)(x), expected)


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
