"""MXFP4Linear computes what its definition says, and keeps its transform through moves."""

import pytest
import torch
from torch import nn

from mxtorq.errors import ModelError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import dequantize, fake_quantize, quantize
from mxtorq.surgery.linear import (
    MXFP4Linear,
    StoredLinear,
    TransformedLinear,
    fused_weight,
    fused_weights,
    linear_at,
)
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.rotation import BlockRotation


@pytest.fixture
def layer() -> MXFP4Linear:
    torch.manual_seed(0)
    codes = quantize(torch.randn(7, 96), ScaleRule.EVEN)
    return MXFP4Linear(codes, torch.randn(7), BlockRotation(96, sylvester(32)), ScaleRule.RCEIL)


def test_it_is_its_definition(layer: MXFP4Linear) -> None:
    x = torch.randn(2, 5, 96)
    a = fake_quantize(layer.transform.apply(x), ScaleRule.RCEIL)
    expected = nn.functional.linear(a, dequantize(layer.weight_mxfp4), layer.bias)
    assert torch.equal(layer(x), expected)
    plain = fake_quantize(layer.transform.apply(x), ScaleRule.FLOOR)
    assert not torch.equal(a, plain)  # the rule is really used


def test_operands_are_exact_in_bfloat16(layer: MXFP4Linear) -> None:
    """So a BF16 product differs from float64 by its float32 sums and one rounding at the end."""
    layer = layer.to(torch.bfloat16)
    x = torch.randn(64, 96).bfloat16()
    found = layer(x)
    a = fake_quantize(layer.transform.apply(x.float()), ScaleRule.RCEIL).double()
    w = dequantize(layer.weight_mxfp4, torch.float64)
    exact = a @ w.T + layer.bias.double()
    assert found.dtype == torch.bfloat16
    eps32, eps16 = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps
    magnitude = a.abs() @ w.abs().T + layer.bias.double().abs()
    # 96 float32 additions; the sum and the biased sum are each rounded to bfloat16 once
    bound = 96 * eps32 * magnitude + eps16 * (exact.abs() + (exact - layer.bias.double()).abs())
    assert ((found.double() - exact).abs() <= bound).all()


def test_moving_it_does_not_round_its_transform(layer: MXFP4Linear) -> None:
    before = layer.transform.tensors()["rotation"].clone()
    moved = layer.to(torch.bfloat16).to(torch.float32)
    after = moved.transform.tensors()["rotation"]
    assert after.dtype == torch.float64
    assert torch.equal(after, before)
    assert moved.weight_packed.dtype == torch.uint8


def test_it_says_what_it_is(layer: MXFP4Linear) -> None:
    assert "in_features=96, out_features=7" in repr(layer)
    assert "transform=block-rotation, rule=rceil" in repr(layer)


def test_transformed_linear_keeps_the_function() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(64, 5, dtype=torch.float64)
    rotation = BlockRotation(64, sylvester(32))
    changed = TransformedLinear(rotation.fuse(linear.weight.detach()), linear.bias, rotation)
    x = torch.randn(9, 64, dtype=torch.float64)
    bound = 4 * 64 * torch.finfo(torch.float64).eps * (x.norm(dim=1).max() * linear.weight.norm())
    assert (changed(x) - linear(x)).abs().max() <= bound


@pytest.mark.parametrize("bias", [True, False])
def test_a_stored_weight_computes_as_a_wide_one(bias: bool) -> None:
    torch.manual_seed(2)
    wide = nn.Linear(64, 5, bias=bias)
    with torch.no_grad():
        wide.weight.copy_(wide.weight.bfloat16())
    stored = StoredLinear.like(wide)
    assert {parameter.device.type for parameter in stored.parameters()} == {"meta"}
    stored.weight, stored.bias = nn.Parameter(wide.weight.bfloat16(), False), wide.bias
    x = torch.randn(9, 64)
    assert torch.equal(stored(x), wide(x))
    assert stored.weight.dtype == torch.bfloat16
    stored.widen_()
    assert stored.weight.dtype == torch.float32
    assert torch.equal(stored(x), wide(x))


@pytest.mark.parametrize("stored", [True, False])
def test_linears_are_fused_one_below_the_other(stored: bool) -> None:
    """Two and a bit of what is fused at once, and one that is smaller."""
    torch.manual_seed(3)
    linears = [nn.Linear(96, rows, bias=False) for rows in (1100, 7)]
    if stored:
        for linear in linears:
            linear.weight = nn.Parameter(linear.weight.bfloat16(), False)
    rotation = BlockRotation(96, sylvester(32))
    fused = fused_weights(linears, rotation)
    expected = torch.cat([fused_weight(linear, rotation) for linear in linears])
    # Either sums 32 products in float64, in an order of its own, and is rounded to float32.
    bound = torch.finfo(torch.float32).eps * expected.abs().max()
    assert (fused - expected).abs().max() <= bound


def test_what_is_no_linear_is_refused() -> None:
    with pytest.raises(ModelError, match="LayerNorm"):
        linear_at(nn.Sequential(nn.LayerNorm(4)), "0")
