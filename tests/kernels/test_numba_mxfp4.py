"""The numba backend gives the eager bits: golden vectors, every bfloat16, every byte and code."""

import json
from pathlib import Path

import pytest
import torch

from mxtorq.errors import FormatError
from mxtorq.formats import mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4

pytest.importorskip("numba", reason="the extra numba is not installed")

from mxtorq.kernels.numba import mxfp4 as fast
from mxtorq.kernels.numba.pool import over_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "mxfp4.json"
CASES = json.loads(GOLDEN.read_text())["cases"]
FLOATS = [torch.float32, torch.bfloat16]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bits; any NaN equals any NaN."""
    whole = torch.int32 if one.dtype == torch.float32 else torch.int16
    equal = one.view(whole) == other.view(whole)
    return one.shape == other.shape and bool((equal | (one.isnan() & other.isnan())).all())


def assert_same(values: torch.Tensor, rule: ScaleRule) -> None:
    expected, found = mxfp4.quantize(values, rule), fast.quantize(values, rule)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.e8m0, expected.e8m0)
    if values.dtype != torch.float16:
        assert same(fast.fake_quantize(values, rule), mxfp4.fake_quantize(values, rule))


def every_bfloat16() -> torch.Tensor:
    return torch.arange(65536).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_golden(case: dict) -> None:
    bits = torch.tensor([int(b, 16) for b in case["input_bits"]]).to(torch.int32)
    found = fast.quantize(bits.view(torch.float32), ScaleRule(case["rule"]))
    assert found.e8m0.tolist() == [case["e8m0"]]
    assert bytes(found.packed.tolist()).hex() == case["packed"]
    assert_same(bits.view(torch.float32), ScaleRule(case["rule"]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", ScaleRule)
def test_every_bfloat16(rule: ScaleRule, dtype: torch.dtype) -> None:
    """Each alone as its block's maximum, all in order, and all among strangers."""
    values = every_bfloat16().to(dtype)
    alone = torch.zeros(65536, 32, dtype=dtype)
    alone[torch.arange(65536), torch.arange(65536) % 32] = values
    assert_same(alone, rule)
    assert_same(values.view(-1, 64), rule)
    for seed in range(4):
        order = torch.randperm(65536, generator=torch.Generator().manual_seed(seed))
        assert_same(values[order].view(-1, 128), rule)
    finite = values[torch.isfinite(values)]
    kin = finite[: len(finite) // 1024 * 1024].view(-1, 1024).sort(-1).values
    draw = torch.Generator().manual_seed(9)
    assert_same(kin[:, torch.randperm(1024, generator=draw)], rule)


@pytest.mark.parametrize("rule", ScaleRule)
def test_any_float32_and_float16(rule: ScaleRule) -> None:
    draw = torch.Generator().manual_seed(int(rule.card.add) & 0xFF)
    bits = torch.randint(-(2**31), 2**31, (4096, 96), generator=draw).to(torch.int32)
    values = bits.view(torch.float32)
    assert_same(values, rule)
    # One octave a block: ties, cuts and thresholds of the rules come often.
    close = (bits & 0x00FFFFFF) | ((torch.arange(4096)[:, None] % 254 + 1) << 23).to(torch.int32)
    assert_same(close.view(torch.float32), rule)
    assert_same(torch.randn(64, 96, generator=draw).half(), rule)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_byte_with_every_code(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(16)[:, None]
    for times in (1, 17):  # in the caches, and past them
        stored = MXFP4(codes.repeat(times, 1), scales.repeat(times, 1))
        found = fast.dequantize(stored, dtype)
        assert fast.streamed(found) is (times == 17)
        assert same(found, mxfp4.dequantize(stored, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_results_and_given_memory(dtype: torch.dtype) -> None:
    """Past the caches, into memory that lies anywhere, and over the input itself."""
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(2049, 2048, generator=draw).to(dtype)
    expected = mxfp4.fake_quantize(values)
    assert fast.streamed(torch.empty_like(values))
    assert same(fast.fake_quantize(values), expected)
    stored = mxfp4.quantize(values)
    assert same(fast.dequantize(stored, dtype), expected)
    odd = torch.empty(values.numel() + 1, dtype=dtype)[1:].view(values.shape)
    assert not fast.streamed(odd)
    assert fast.fake_quantize(values, out=odd) is odd
    assert same(odd, expected)
    odd.zero_()
    assert same(fast.dequantize(stored, dtype, odd), expected)
    assert same(fast.fake_quantize(values, out=values), expected)


def test_strides_and_empty_rows() -> None:
    values = torch.randn(8, 3, 64, generator=torch.Generator().manual_seed(2))
    turned = values.transpose(0, 1)
    assert_same(turned, ScaleRule.EVEN)
    assert fast.quantize(torch.empty(0, 64)).packed.shape == (0, 32)
    assert fast.fake_quantize(torch.empty(0, 64)).shape == (0, 64)


def test_what_is_refused_is_what_eager_refuses() -> None:
    for bad in (torch.randn(4, 33), torch.randn(4, 32).double()):
        messages = []
        for quantize in (mxfp4.quantize, fast.quantize):
            with pytest.raises(FormatError) as caught:
                quantize(bad)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    with pytest.raises(FormatError, match="on cpu, not contiguous"):
        fast.fake_quantize(torch.randn(2, 32), out=torch.empty(32, 2).T)
    with pytest.raises(FormatError, match=r"an out torch\.bfloat16"):
        fast.fake_quantize(torch.randn(2, 32), out=torch.empty(2, 32).bfloat16())
    with pytest.raises(FormatError, match="each scale byte belongs to 16 bytes"):
        fast.dequantize(MXFP4(torch.zeros(17).byte(), torch.zeros(1).byte()))


def test_threads_change_nothing() -> None:
    values = torch.randn(1021, 256, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((fast.quantize(values), fast.fake_quantize(values)))
    finally:
        torch.set_num_threads(before)
    for codes, fake in results[1:]:
        assert torch.equal(codes.packed, results[0][0].packed)
        assert torch.equal(codes.e8m0, results[0][0].e8m0)
        assert same(fake, results[0][1])


def test_parts_cover_all_rows_and_errors_come_through() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        seen: list[tuple[int, int]] = []
        over_rows(lambda start, stop: seen.append((start, stop)), 10)
        assert sorted(seen) == [(0, 2), (2, 5), (5, 7), (7, 10)]
        seen.clear()
        over_rows(lambda start, stop: seen.append((start, stop)), 10, least=6)
        assert seen == [(0, 10)]

        def fails(start: int, stop: int) -> None:
            if start:
                raise ZeroDivisionError(start)

        with pytest.raises(ZeroDivisionError):
            over_rows(fails, 10)
    finally:
        torch.set_num_threads(before)
