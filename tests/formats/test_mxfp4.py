"""Tensors against exact fractions: every bfloat16, any float32, every byte with every code.

All comparisons are by bits. The exhaustive tests use the remembered reference (`exact`); the
property test draws whole blocks of float32 patterns and uses the reference itself.
"""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxtorq.errors import FormatError
from mxtorq.formats import e2m1, mxfp4, reference
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, dequantize, fake_quantize, quantize

NOT_FINITE = [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001]


def float32(patterns):
    """float32 values from unsigned bit patterns."""
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


def all_bfloat16():
    return torch.arange(65536).to(torch.int16).view(torch.bfloat16)


def gaussian(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(one, other):
    """Equal shape, dtype and bits; any NaN equals any NaN, since a NaN's bits mean nothing here."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    both_nan = one.isnan() & other.isnan()
    as_ints = {4: torch.int32, 2: torch.int16, 8: torch.int64}[one.element_size()]
    return bool((both_nan | (one.view(as_ints) == other.view(as_ints))).all())


def same_parts(one, other):
    return torch.equal(one.packed, other.packed) and torch.equal(one.e8m0, other.e8m0)


def exact_value(code, byte):
    """The float32 of a code under a byte: exact, or Inf beyond the range, with the sign of -0."""
    value = reference.element_value(code, byte)
    if value is None:
        return math.nan
    return math.copysign(float(value), -1.0 if code >= 8 else 1.0)


VALUES = [[exact_value(code, byte) for code in range(16)] for byte in range(256)]


def assert_exact(quantize_block, rows, rule):
    """`quantize` and both ways back on blocks of 32, against an exact block function."""
    quantized = quantize(rows, rule)
    assert quantized.packed.dtype == quantized.e8m0.dtype == torch.uint8
    codes = e2m1.unpack(quantized.packed)
    for values, byte, row in zip(
        rows.tolist(), quantized.e8m0.flatten().tolist(), codes.tolist(), strict=True
    ):
        assert (byte, row) == quantize_block(values, rule), f"{values} under {rule}"
    expected = torch.tensor(
        [
            [VALUES[byte][code] for code in row]
            for byte, row in zip(quantized.e8m0.flatten().tolist(), codes.tolist(), strict=True)
        ]
    )
    assert same(dequantize(quantized), expected)
    if rows.dtype != torch.float16:
        assert same(fake_quantize(rows, rule), expected.to(rows.dtype))


# Every bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", ScaleRule)
def test_every_bfloat16_alone_in_its_block(exact, rule, dtype):
    """Each value is the maximum of its block, at a place of its own; 31 zeros follow or precede."""
    blocks = torch.zeros(65536, 32, dtype=dtype)
    places = torch.arange(65536) % 32
    blocks[torch.arange(65536), places] = all_bfloat16().to(dtype)
    quantized = quantize(blocks, rule)
    codes = e2m1.unpack(quantized.packed)
    alone = codes[torch.arange(65536), places]
    rest = codes.clone()
    rest[torch.arange(65536), places] = 0
    assert not rest.any()
    for value, byte, code in zip(
        all_bfloat16().tolist(), quantized.e8m0.flatten().tolist(), alone.tolist(), strict=True
    ):
        expected = exact.scale_byte(abs(value), rule)
        assert byte == expected, f"{value!r} under {rule}"
        assert code == (0 if byte == 255 else exact.element_code(value, byte)), f"{value!r}, {rule}"
    assert same(fake_quantize(blocks, rule), dequantize(quantized, torch.bfloat16).to(dtype))


@pytest.mark.parametrize("rule", ScaleRule)
def test_every_bfloat16_in_order(exact, rule):
    """Blocks of 32 neighbours: all elements near the maximum, so many ties and both signs' ends."""
    assert_exact(exact.quantize_block, all_bfloat16().view(-1, 32), rule)


@pytest.mark.parametrize("rule", ScaleRule)
def test_every_bfloat16_shuffled(exact, rule):
    """Blocks that span the whole range, one in eight poisoned by a NaN or Inf."""
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(4))
    assert_exact(exact.quantize_block, all_bfloat16()[order].view(-1, 32), rule)


@pytest.mark.parametrize("rule", ScaleRule)
def test_every_finite_bfloat16_shuffled_among_its_kin(exact, rule):
    """Blocks of 32 out of 1024 neighbours: a few octaves a block, as in a real tensor."""
    values = all_bfloat16()
    values = values[values.isfinite()]
    generator = torch.Generator().manual_seed(5)
    parts = [part[torch.randperm(len(part), generator=generator)] for part in values.split(1024)]
    assert_exact(exact.quantize_block, torch.cat(parts).view(-1, 32), rule)


# Any float32

FRACTIONS = sorted(
    {
        (turn + ulp) % (1 << 23)
        for turn in (0, 0x200000, 0x400000, 0x600000, 0x680000)
        for ulp in (-1, 0, 1)
    }
)


@st.composite
def blocks_of_patterns(draw):
    """32 float32 patterns: anything at all, or a few octaves under one exponent with turns."""
    anything = st.integers(0, (1 << 32) - 1)
    top = draw(st.integers(0, 254))
    related = st.builds(
        lambda sign, drop, fraction: sign << 31 | max(top - drop, 0) << 23 | fraction,
        st.integers(0, 1),
        st.integers(0, 6),
        st.sampled_from(FRACTIONS) | st.integers(0, (1 << 23) - 1),
    )
    patterns = draw(
        st.lists(anything, min_size=32, max_size=32) | st.lists(related, min_size=32, max_size=32)
    )
    if draw(st.integers(0, 9)) == 0:
        patterns[draw(st.integers(0, 31))] = draw(st.sampled_from(NOT_FINITE))
    return patterns


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(patterns=blocks_of_patterns(), rule=st.sampled_from(list(ScaleRule)))
def test_any_float32(patterns, rule):
    assert_exact(reference.quantize_block, float32(patterns)[None], rule)


@pytest.mark.parametrize("rule", ScaleRule)
def test_subnormal_float32(exact, rule):
    """Blocks without a normal number: the byte is 0 and the codes are what 2^-127 makes of them."""
    generator = torch.Generator().manual_seed(6)
    patterns = torch.randint(1 << 23, (64, 32), generator=generator)
    patterns >>= torch.arange(64)[:, None] % 23  # from 2^-127 down to 2^-149
    rows = float32((patterns | (patterns & 1) << 31).tolist())
    assert_exact(exact.quantize_block, rows, rule)
    assert not quantize(rows, rule).e8m0.any()


def test_every_float16():
    """float16 is read exactly: its 65,536 patterns give what the same float32 numbers give."""
    values = torch.arange(65536).to(torch.int16).view(torch.float16).view(-1, 64)
    for rule in ScaleRule:
        assert same_parts(quantize(values, rule), quantize(values.float(), rule))


@pytest.mark.parametrize("rule", ScaleRule)
def test_float16_against_the_reference(exact, rule):
    patterns = torch.randint(65536, (48, 32), generator=torch.Generator().manual_seed(7))
    patterns[:40] &= 0xBFFF  # clear the top exponent bit: no NaN, no Inf
    rows = patterns.to(torch.int16).view(torch.float16)
    assert rows[:40].isfinite().all()
    assert_exact(exact.quantize_block, rows, rule)


# The way back


def every_byte_with_every_code():
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).expand(256, 32)
    return MXFP4(e2m1.pack(codes), torch.arange(256, dtype=torch.uint8)[:, None])


def test_dequantize_every_byte_with_every_code():
    """Exact, and Inf only where 2^126 or 2^127 carry an element out of float32."""
    values = dequantize(every_byte_with_every_code())
    assert values.dtype == torch.float32
    assert same(values, torch.tensor([row * 2 for row in VALUES]))
    assert values[:253].isfinite().all()
    assert values[253].isinf().sum() == 8  # 4 and 6, both signs, twice
    assert values[254].isinf().sum() == 16  # 2, 3, 4 and 6
    assert values[255].isnan().all()


def test_bfloat16_holds_every_value():
    everything = every_byte_with_every_code()
    values = dequantize(everything, torch.bfloat16)
    assert values.dtype == torch.bfloat16
    assert same(values.float(), dequantize(everything))


def test_dequantize_to_float64():
    everything = every_byte_with_every_code()
    below = MXFP4(everything.packed[:253], everything.e8m0[:253])
    values = dequantize(below, torch.float64)
    assert values.dtype == torch.float64
    assert same(values, dequantize(below).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ScaleRule)
def test_fake_quantize_is_the_way_there_and_back(rule, dtype):
    values = gaussian(40, 96).to(dtype)
    values[7, 40] = math.nan
    values[8, 40] = -math.inf
    values[9] = -0.0
    there_and_back = dequantize(quantize(values, rule), dtype)
    assert same(fake_quantize(values, rule), there_and_back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ScaleRule)
def test_a_quantized_tensor_does_not_change_again(rule, dtype):
    """Rounding leaves a maximum of 2, 3, 4 or 6 times the scale. The rule then chooses the same
    scale again, or half of it where the maximum is 3 (RCEIL) or 2 (CEIL), and all codes up to that
    maximum have a code of twice the size: the values stay, to the bit."""
    once = fake_quantize(gaussian(64, 64).to(dtype), rule)
    assert same(fake_quantize(once, rule), once)


# Special blocks


@pytest.mark.parametrize("poison", NOT_FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_that_is_not_finite(dtype, poison):
    """At each of the 32 places: byte 255 and codes 0 for this block, nothing for its neighbours."""
    if dtype == torch.float16:
        clean = gaussian(32, 96).half()
    else:
        clean = (gaussian(32, 96) * 1e30).to(dtype)
    poisoned = clean.clone()
    poisoned[torch.arange(32), 32 + torch.arange(32)] = float32([poison]).to(dtype)
    assert poisoned.isfinite().logical_not().sum() == 32
    for rule in ScaleRule:
        expected, ours = quantize(clean, rule), quantize(poisoned, rule)
        assert (ours.e8m0[:, 1] == 255).all()
        assert not ours.packed[:, 16:32].any()
        assert torch.equal(ours.e8m0[:, ::2], expected.e8m0[:, ::2])
        assert torch.equal(ours.packed[:, :16], expected.packed[:, :16])
        assert torch.equal(ours.packed[:, 32:], expected.packed[:, 32:])
        values = dequantize(ours)
        assert values[:, 32:64].isnan().all()
        assert values[:, :32].isfinite().all()
        assert values[:, 64:].isfinite().all()
        if dtype != torch.float16:
            assert same(fake_quantize(poisoned, rule), values.to(dtype))


@pytest.mark.parametrize("rule", ScaleRule)
def test_zero_blocks(rule):
    zeros = torch.zeros(2, 32)
    zeros[1] = -0.0
    quantized = quantize(zeros, rule)
    assert quantized.e8m0.tolist() == [[0], [0]]
    assert quantized.packed.tolist() == [[0x00] * 16, [0x88] * 16]
    assert same(dequantize(quantized), zeros)
    assert same(fake_quantize(zeros, rule), zeros)


def test_the_default_rule_is_that_of_the_specification():
    values = float32([0x40FFFFFF] + [0] * 31)  # just below 8: only FLOOR and FLOOR6 give 127
    assert quantize(values).e8m0.item() == 127
    assert same(fake_quantize(values), fake_quantize(values, ScaleRule.FLOOR))
    values = float32([0x40800000] + [0] * 31)  # 4: FLOOR6 gives 126
    assert quantize(values).e8m0.item() == 127


# Shapes, chunks and memory


@pytest.mark.parametrize("blocks", [1, 3, 7, 49, 50, 51])
def test_bits_do_not_depend_on_the_chunk_size(monkeypatch, blocks):
    values = gaussian(10, 160)
    values[3, 70] = math.nan
    expected = quantize(values, ScaleRule.EVEN)
    back = dequantize(expected)
    monkeypatch.setattr(mxfp4, "CHUNK_BLOCKS", blocks)
    assert same_parts(quantize(values, ScaleRule.EVEN), expected)
    assert same(dequantize(expected), back)
    assert same(fake_quantize(values, ScaleRule.EVEN), back)


def test_a_tensor_of_several_chunks_and_a_rest():
    values = gaussian(2 * mxfp4.CHUNK_BLOCKS + 5, 32)
    whole = quantize(values)
    for row in (0, mxfp4.CHUNK_BLOCKS - 1, mxfp4.CHUNK_BLOCKS, len(values) - 1):
        alone = quantize(values[row])
        assert torch.equal(whole.packed[row], alone.packed)
        assert torch.equal(whole.e8m0[row], alone.e8m0)
        assert same(dequantize(whole)[row], dequantize(alone))
        assert same(fake_quantize(values)[row], fake_quantize(values[row]))


@pytest.mark.parametrize("shape", [(32,), (1, 32), (4, 96), (2, 3, 64), (2, 1, 3, 32), (0, 64)])
def test_shapes(shape):
    values = gaussian(*shape)
    quantized = quantize(values)
    *rows, width = shape
    assert quantized.packed.shape == (*rows, width // 2)
    assert quantized.e8m0.shape == (*rows, width // 32)
    assert dequantize(quantized).shape == shape
    assert fake_quantize(values).shape == shape
    # Blocks lie along the last axis, in order.
    flat = quantize(values.reshape(-1, 32))
    assert torch.equal(flat.packed.flatten(), quantized.packed.flatten())
    assert torch.equal(flat.e8m0.flatten(), quantized.e8m0.flatten())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 2),
        lambda x: x[..., ::2],
        lambda x: x[1:, :, 32:],
        lambda x: x.permute(1, 0, 2),
        lambda x: x[:1].expand(5, -1, -1),
        lambda x: x.flip(-1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_read_as_their_copies(view, dtype):
    values = view(gaussian(64, 3, 64).to(dtype))
    copy = values.contiguous().clone()
    quantized = quantize(values, ScaleRule.RCEIL)
    assert same_parts(quantized, quantize(copy, ScaleRule.RCEIL))
    assert same(fake_quantize(values, ScaleRule.RCEIL), fake_quantize(copy, ScaleRule.RCEIL))
    # The parts may be views as well: a slice of rows of a packed weight.
    part = MXFP4(quantized.packed[::2], quantized.e8m0[::2])
    assert same(dequantize(part), dequantize(quantized)[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_written_to_the_input(dtype):
    values = gaussian(8, 64).to(dtype)
    values[2, 3], values[4] = math.nan, -0.0
    before = values.clone()
    quantized = quantize(values)
    packed, scales = quantized.packed.clone(), quantized.e8m0.clone()
    dequantize(quantized)
    if dtype != torch.float16:
        out = fake_quantize(values)
        assert out.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()
    assert same(values, before)
    assert same_parts(quantized, MXFP4(packed, scales))


def test_a_parameter_is_quantized_like_its_values():
    values = gaussian(4, 64)
    parameter = torch.nn.Parameter(values.clone())
    assert same_parts(quantize(parameter), quantize(values))
    assert same(fake_quantize(parameter).detach(), fake_quantize(values))


# Errors


def assert_four_parts(error, *, found, todo):
    """The message has its four parts in order; `found` and `todo` name what helps the caller."""
    assert isinstance(error, FormatError)
    assert re.fullmatch(r"asked: .+\nfound: .+\nwhy:   .+\nto do: .+", str(error))
    assert found in error.found
    assert todo in error.todo


@pytest.mark.parametrize("function", [quantize, fake_quantize])
@pytest.mark.parametrize("shape", [(2, 33), (2, 31), (16,), (64, 48), (2, 0), (0,)])
def test_a_width_that_is_not_whole_blocks(function, shape):
    with pytest.raises(FormatError) as caught:
        function(torch.zeros(shape))
    assert_four_parts(caught.value, found=f"shape {shape}", todo="a multiple of 32")
    assert "blocks of 32" in caught.value.why


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (quantize, torch.float64),
        (fake_quantize, torch.float64),
        (fake_quantize, torch.float16),
        (quantize, torch.float8_e4m3fn),
    ],
)
def test_a_dtype_that_would_be_rounded_twice_or_overflow(function, dtype):
    with pytest.raises(FormatError) as caught:
        function(torch.zeros(2, 32).to(dtype))
    assert_four_parts(caught.value, found=str(dtype), todo="cast to float32")
    assert "torch.float32, torch.bfloat16" in caught.value.why
    assert str(dtype) not in caught.value.why


@pytest.mark.parametrize(
    ("packed", "scales"),
    [
        ((2, 16), (2, 2)),
        ((2, 32), (2, 1)),
        ((2, 16), (1, 1)),
        ((2, 16), (1,)),
        ((16,), (1, 1)),
        ((2, 15), (2, 1)),
        ((32, 1), (1, 32)),
    ],
)
def test_parts_that_do_not_belong_together(packed, scales):
    parts = MXFP4(torch.zeros(packed, dtype=torch.uint8), torch.zeros(scales, dtype=torch.uint8))
    with pytest.raises(FormatError) as caught:
        dequantize(parts)
    found = f"torch.uint8 {packed} and scales torch.uint8 {scales}"
    assert_four_parts(caught.value, found=found, todo="of one weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_dequantize_to_a_dtype_without_the_range(dtype):
    with pytest.raises(FormatError) as caught:
        dequantize(quantize(torch.ones(32)), dtype)
    assert_four_parts(caught.value, found="2^-127 to 2^127", todo="cast afterwards")
    assert str(dtype) in caught.value.asked


# Another library reads and writes the same bytes


@pytest.fixture(scope="module")
def compressed_tensors():
    """compressed-tensors' MXFP4 compressor and the scheme that names it."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weights = quantization.QuantizationArgs(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="group",
        group_size=32,
        scale_dtype=torch.uint8,
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    return compressors.MXFP4PackedCompressor, scheme


def test_compressed_tensors_reads_our_nibbles(compressed_tensors):
    """All 256 packed bytes at scale 1: which nibble is first, and what each code is worth."""
    compressor, scheme = compressed_tensors
    parts = MXFP4(
        torch.arange(256, dtype=torch.uint8).view(16, 16),
        torch.full((16, 1), 127, dtype=torch.uint8),
    )
    state = {"weight_packed": parts.packed, "weight_scale": parts.e8m0}
    theirs = compressor.decompress(state, scheme)["weight"]
    assert same(theirs.float(), dequantize(parts))


def test_compressed_tensors_reads_our_scales(compressed_tensors):
    """Every byte that a float32 weight can have. (255 it reads as 2^128, where the format says NaN;
    byte 0 is left out because a subnormal power of two depends on its pow.)"""
    compressor, scheme = compressed_tensors
    everything = every_byte_with_every_code()
    parts = MXFP4(everything.packed[1:253], everything.e8m0[1:253])
    state = {"weight_packed": parts.packed, "weight_scale": parts.e8m0}
    theirs = compressor.decompress(state, scheme)["weight"]
    assert theirs.dtype == torch.bfloat16
    assert same(theirs, dequantize(parts, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_writes_the_bytes_of_even(compressed_tensors, dtype):
    """Its scale rule and its packing, on Gaussian weights of 96 different sizes."""
    compressor, scheme = compressed_tensors
    mxfp_utils = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    sizes = 2.0 ** (torch.arange(384) % 96 - 48)[:, None]
    weight = (gaussian(384, 256, seed=8) * sizes).to(dtype)
    assert (weight != 0).all()  # it forgets the sign of -0, and of nothing else
    ours = quantize(weight, ScaleRule.EVEN)

    amax = weight.abs().view(384, 8, 32).amax(-1)
    assert torch.equal(mxfp_utils.generate_mx_scales(amax).to(torch.uint8), ours.e8m0)

    state = {"weight": weight, "weight_scale": (2.0 ** (ours.e8m0.float() - 127)).to(dtype)}
    theirs = compressor.compress(state, scheme)
    assert torch.equal(theirs["weight_scale"], ours.e8m0)
    assert torch.equal(theirs["weight_packed"], ours.packed)
