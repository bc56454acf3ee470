"""Triton's quantize, fake_quantize and dequantize have the bits of the eager functions."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from mxtorq.errors import FormatError, UsageError
from mxtorq.formats import mxfp4 as eager
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.kernels.triton import mxfp4 as fast
from triton_device import DEVICE, same

CASES = json.loads((Path(__file__).parents[1] / "golden" / "mxfp4.json").read_text())["cases"]
PATTERNS = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
# The interpreter computes with NumPy, which speaks of the NaN and Inf that are put in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow) .* in multiply:RuntimeWarning")
each_rule = pytest.mark.parametrize("rule", ScaleRule)


def hard_float32(blocks: int) -> torch.Tensor:
    """Blocks over the whole range, subnormals, Inf and NaN included; values of a block lie within
    a few powers of two, and a quarter of them on or beside a rounding cut of some scale."""
    draw = torch.Generator().manual_seed(1)
    exponent = torch.randint(0, 256, (blocks, 1), generator=draw)
    exponent = (exponent - torch.randint(0, 6, (blocks, 32), generator=draw)).clamp(min=0)
    fraction = torch.randint(0, 1 << 23, (blocks, 32), generator=draw)
    near = (fraction & ~0x1FFFFF) + torch.randint(-1, 2, (blocks, 32), generator=draw)
    fraction = torch.where(torch.rand(blocks, 32, generator=draw) < 0.25, near, fraction)
    sign = torch.randint(0, 2, (blocks, 32), generator=draw) << 31
    return ((exponent << 23 | fraction & 0x7FFFFF) | sign).to(torch.int32).view(torch.float32)


def agrees(values: torch.Tensor, rule: ScaleRule) -> bool:
    found, expected = fast.quantize(values.to(DEVICE), rule), eager.quantize(values, rule)
    return same(found.packed, expected.packed) and same(found.e8m0, expected.e8m0)


def agrees_fake(values: torch.Tensor, rule: ScaleRule) -> bool:
    found = fast.fake_quantize(values.to(DEVICE), rule)
    return same(found, eager.fake_quantize(values, rule))


def test_golden_vectors():
    """The bytes of the file itself, from float32 and, where it holds the case, from bfloat16."""
    for case in CASES:
        bits = torch.tensor([int(b, 16) for b in case["input_bits"]]).to(torch.int32)
        inputs = [bits.view(torch.float32)]
        if not (bits & 0xFFFF).any():
            inputs.append((bits >> 16).to(torch.int16).view(torch.bfloat16))
        for values in inputs:
            found = fast.quantize(values.to(DEVICE), ScaleRule(case["rule"]))
            assert found.e8m0.tolist() == [case["e8m0"]], case["name"]
            assert bytes(found.packed.tolist()).hex() == case["packed"], case["name"]


@each_rule
def test_float32(rule):
    values = hard_float32(1111)  # not a whole number of steps
    assert agrees(values, rule)
    assert agrees_fake(values, rule)


@each_rule
def test_every_bfloat16(rule):
    values = PATTERNS.view(torch.bfloat16).view(-1, 32)  # among their neighbours
    assert agrees(values, rule)
    assert agrees_fake(values, rule)


def test_every_bfloat16_among_any_others():
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(2))
    assert agrees(PATTERNS[order].view(torch.bfloat16).view(2, -1, 32), ScaleRule.RCEIL)


def test_every_float16():
    assert agrees(PATTERNS.view(torch.float16).view(-1, 64), ScaleRule.EVEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_scale_and_code(dtype):
    packed = torch.randperm(256, generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    stored = MXFP4(packed.view(1, 256).repeat(256, 1), torch.arange(256).repeat_interleave(16))
    stored = MXFP4(stored.packed, stored.e8m0.to(torch.uint8).view(256, 16))
    found = fast.dequantize(MXFP4(*(part.to(DEVICE) for part in stored)), dtype)
    assert same(found, eager.dequantize(stored, dtype))
    assert found[255].isnan().all()
    assert found[0].abs().max() == 6 * 2.0**-127


@pytest.mark.parametrize("shape", [(32,), (3, 5, 64), (0, 32)])
def test_shapes(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    found, expected = fast.quantize(values.to(DEVICE)), eager.quantize(values)
    assert same(found.packed, expected.packed)
    assert same(found.e8m0, expected.e8m0)
    assert same(fast.dequantize(found), eager.dequantize(expected))
    assert same(fast.fake_quantize(values.to(DEVICE)), eager.fake_quantize(values))


def test_what_is_not_contiguous():
    wide = torch.randn(6, 128, generator=torch.Generator().manual_seed(5))
    for values in (wide[::2], wide[:, 32:96], wide.T.contiguous().T, wide.view(6, 2, 64)[:, 1]):
        assert agrees(values, ScaleRule.FLOOR)
        assert agrees_fake(values, ScaleRule.FLOOR)
    part = MXFP4(*(tensor[::2].to(DEVICE) for tensor in eager.quantize(wide)))
    assert same(fast.dequantize(part), eager.dequantize(eager.quantize(wide[::2])))


def test_results_that_exist_already():
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))
    here = values.to(DEVICE)
    room = torch.full_like(here, 7.0)
    assert fast.fake_quantize(here, out=room) is room
    assert same(room, eager.fake_quantize(values))
    assert same(fast.fake_quantize(here, out=here), room)  # in place
    room = torch.empty(4, 64, dtype=torch.bfloat16, device=DEVICE)
    assert fast.dequantize(fast.quantize(here), torch.bfloat16, out=room) is room
    assert same(room, eager.dequantize(eager.quantize(values), torch.bfloat16))
    for wrong in (room.T, room[:2], room.float(), torch.empty(4, 128, device=DEVICE)[:, ::2]):
        with pytest.raises(UsageError, match="contiguous"):
            fast.dequantize(fast.quantize(here), torch.bfloat16, out=wrong)


def test_refused_as_in_eager():
    for values in (torch.zeros(4, 48), torch.zeros(32, dtype=torch.float64)):
        for function in (fast.quantize, fast.fake_quantize):
            with pytest.raises(FormatError):
                function(values.to(DEVICE))
    with pytest.raises(FormatError, match="float16"):
        fast.fake_quantize(torch.zeros(32, dtype=torch.float16, device=DEVICE))
    good = fast.quantize(torch.zeros(2, 32, device=DEVICE))
    with pytest.raises(FormatError, match="float16"):
        fast.dequantize(good, torch.float16)
    with pytest.raises(FormatError, match="belongs to 16 bytes"):
        fast.dequantize(MXFP4(good.packed, good.e8m0[:1]))
