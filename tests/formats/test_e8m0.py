"""Scale bytes: the integer formula against exact fractions, for every bfloat16 and every threshold.

The formula looks at an exponent and whether a fraction lies above a constant. All 65,536 bfloat16
patterns see every exponent; the float32 patterns next to each rule's threshold see every last ulp.
"""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from mxtorq.formats import e8m0, reference
from mxtorq.formats.e8m0 import ScaleRule

# Fractions at which some rule turns: 1 (floor, ceil), 1.5 (rceil, floor6), 1.75 (even),
# 1.8125 (uos); and 1.25, where an EVEN that rounded its ties up would show.
TURNS = (0x000000, 0x400000, 0x600000, 0x680000, 0x200000)
INF = 0x7F800000


def around_the_turns():
    """float32 magnitudes: each turn and its two neighbours, in every octave."""
    patterns = {
        (exponent << 23) + turn + ulp
        for exponent in range(255)
        for turn in TURNS
        for ulp in (-1, 0, 1)
    }
    return sorted(p for p in patterns if p >= 0)


def subnormals():
    generator = torch.Generator().manual_seed(1)
    powers = {(1 << k) + ulp for k in range(23) for ulp in (-1, 0, 1)}
    return sorted(powers | set(torch.randint(1 << 23, (2000,), generator=generator).tolist()))


def not_finite():
    return [INF, INF + 1, 0x7FBFFFFF, 0x7FC00000, 0x7FC00001, 0x7FFFFFFF]


def assert_bytes(exact, patterns, rule):
    ours = e8m0.encode_amax(patterns, rule)
    assert ours.dtype == torch.uint8
    for pattern, value, byte in zip(
        patterns.tolist(), patterns.view(torch.float32).tolist(), ours.tolist(), strict=True
    ):
        assert byte == exact.scale_byte(value, rule), f"amax {pattern:#010x} = {value!r}, {rule}"


@pytest.mark.parametrize("rule", ScaleRule)
def test_every_bfloat16(exact, rule):
    """Both signs of each magnitude, as a block's maximum would arrive."""
    values = torch.arange(65536).to(torch.int16).view(torch.bfloat16).float()
    magnitudes = e8m0.magnitude_bits(values)
    assert torch.equal(magnitudes[:32768], magnitudes[32768:])
    assert magnitudes[:32768].unique().numel() == 32768
    assert_bytes(exact, magnitudes[:32768], rule)


@pytest.mark.parametrize("rule", ScaleRule)
@pytest.mark.parametrize("patterns", [around_the_turns, subnormals, not_finite])
def test_float32(exact, patterns, rule):
    assert_bytes(exact, torch.tensor(patterns(), dtype=torch.int32), rule)


@pytest.mark.parametrize(
    ("rule", "last_down"),
    [
        ("floor", 0x40FFFFFF),
        ("even", 0x40DFFFFF),
        ("rceil", 0x40C00000),
        ("ceil", 0x40800000),
        ("uos", 0x40E80000),
    ],
)
def test_the_last_amax_with_scale_one(rule, last_down):
    """Literals, so that formula and oracle cannot be wrong together."""
    amax = torch.tensor([last_down, last_down + 1], dtype=torch.int32)
    assert e8m0.encode_amax(amax, ScaleRule(rule)).tolist() == [127, 128]


def test_the_first_amax_of_floor6_with_scale_one():
    amax = torch.tensor([0x40BFFFFF, 0x40C00000], dtype=torch.int32)
    assert e8m0.encode_amax(amax, ScaleRule.FLOOR6).tolist() == [126, 127]


def test_no_float32_reaches_a_byte_above_253():
    """So a byte 254 in a checkpoint was written by another rule, and 255 only by NaN or Inf."""
    largest = torch.tensor([INF - 1], dtype=torch.int32)
    assert max(e8m0.encode_amax(largest, rule).item() for rule in ScaleRule) == 253


def test_shapes_are_kept():
    assert e8m0.encode_amax(torch.zeros(2, 3, 5, dtype=torch.int32), ScaleRule.EVEN).shape == (
        2,
        3,
        5,
    )


def test_magnitude_bits_order_like_magnitudes_with_nan_on_top():
    rising = torch.tensor(
        [0.0, 2.0**-149, 2.0**-126, 1.0, 3.4e38, float("inf"), float("nan")], dtype=torch.float32
    )
    bits = e8m0.magnitude_bits(rising)
    assert bits.tolist() == sorted(set(bits.tolist()))
    assert torch.equal(e8m0.magnitude_bits(-rising), bits)
    assert bits[-2].item() == INF


def test_magnitude_bits_of_a_view():
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    assert torch.equal(e8m0.magnitude_bits(values.t()), e8m0.magnitude_bits(values).t())


ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def test_decode_is_exact():
    values = e8m0.decode(ALL_BYTES)
    assert values.dtype == torch.float32
    exact_values = [Fraction(v) for v in values[:255].tolist()]
    assert exact_values == [Fraction(2) ** (b - 127) for b in range(255)]
    assert values[255].isnan()


def test_decode_agrees_with_ml_dtypes():
    witness = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(e8m0.decode(ALL_BYTES).numpy(), witness)


def test_decode_inverse_is_exact():
    inverse = e8m0.decode_inverse(ALL_BYTES)
    assert [Fraction(v) for v in inverse[:255].tolist()] == [
        Fraction(2) ** (127 - b) for b in range(255)
    ]
    assert inverse[255].isnan()
    assert torch.equal((inverse * e8m0.decode(ALL_BYTES))[:255], torch.ones(255))


def test_decode_reads_what_encode_chose():
    """4 * 2^e has the scale 2^e under every rule but FLOOR6."""
    amax = e8m0.decode(ALL_BYTES[1:253]) * 4
    for rule in set(ScaleRule) - {ScaleRule.FLOOR6}:
        assert torch.equal(e8m0.encode_amax(e8m0.magnitude_bits(amax), rule), ALL_BYTES[1:253])


@pytest.mark.parametrize("rule", ScaleRule)
def test_a_card_says_everything(rule):
    card = rule.card
    assert card.formula
    assert card.cost
    assert card.used_by


@pytest.mark.parametrize("rule", ScaleRule)
def test_add_is_the_distance_from_the_turn(rule):
    """ADD is derived, not tuned: the fraction at which the exact rule turns, up to a carry."""
    octave = 0x40800000  # [4, 8)
    patterns = torch.tensor([octave, octave + (1 << 23) - 1], dtype=torch.int32)
    low, high = patterns.tolist()
    first, last = (reference.scale_byte(v, rule) for v in patterns.view(torch.float32).tolist())
    if first == last:  # the whole octave has one scale: it turns at the power of two itself
        assert rule.card.add == 0
        return
    while high - low > 1:
        middle = (low + high) // 2
        value = torch.tensor(middle, dtype=torch.int32).view(torch.float32).item()
        if reference.scale_byte(value, rule) == first:
            low = middle
        else:
            high = middle
    # A byte of 127 at 4.0 is the exponent itself; FLOOR6 starts one lower and so subtracts.
    carry = (1 << 23) * (first - 127)
    assert rule.card.add == (octave + (1 << 23) - high) + carry
