"""The oracle has an oracle: values worked out by hand, so that the judge can be found wrong.

Every expected number here is a literal that a reader can check on paper against OCP MX v1.0; none
is computed by the code under test.
"""

import math
import random
import struct
from fractions import Fraction

import pytest

from mxtorq.formats import reference
from mxtorq.formats.e8m0 import ScaleRule

ULP = 2.0**-21  # of a float32 in [4, 8)
LARGEST = (2 - 2.0**-23) * 2.0**127  # float32


@pytest.mark.parametrize(
    ("x", "floor", "ceil"),
    [
        (Fraction(1), 0, 0),
        (Fraction(2), 1, 1),
        (Fraction(3), 1, 2),
        (Fraction(7, 2), 1, 2),
        (Fraction(1, 2), -1, -1),
        (Fraction(1, 3), -2, -1),
        (Fraction(2, 3), -1, 0),
        (Fraction(4, 3), 0, 1),
        (Fraction(2) ** 100, 100, 100),
        (Fraction(2) ** 100 - 1, 99, 100),
        (Fraction(2) ** 100 + 1, 100, 101),
        (1 - Fraction(2) ** -100, -1, 0),
        (1 + Fraction(2) ** -100, 0, 1),
        (Fraction(2) ** -149, -149, -149),
        (3 * Fraction(2) ** -149, -148, -147),
    ],
)
def test_logarithms(x, floor, ceil):
    assert reference.floor_log2(x) == floor
    assert reference.ceil_log2(x) == ceil


# amax, then the bytes of floor, even, rceil, ceil, floor6, uos
BYTES_BY_AMAX = [
    (4.0, 127, 127, 127, 127, 126, 127),
    (5.9, 127, 127, 127, 128, 126, 127),
    (6.5, 127, 127, 128, 128, 127, 127),
    (7.0, 127, 128, 128, 128, 127, 127),
    (8.0, 128, 128, 128, 128, 127, 128),
    # each rule's own threshold, from both sides
    (4 - ULP / 2, 126, 127, 127, 127, 126, 127),
    (4 + ULP, 127, 127, 127, 128, 126, 127),
    (6 - ULP, 127, 127, 127, 128, 126, 127),
    (6.0, 127, 127, 127, 128, 127, 127),
    (6 + ULP, 127, 127, 128, 128, 127, 127),
    (7 - ULP, 127, 127, 128, 128, 127, 127),
    (7.25, 127, 128, 128, 128, 127, 127),
    (7.25 + ULP, 127, 128, 128, 128, 127, 128),
    (8 - ULP, 127, 128, 128, 128, 127, 128),
    # other octaves
    (1.0, 125, 125, 125, 125, 124, 125),
    (3.0, 126, 126, 126, 127, 126, 126),
    (0.01, 118, 118, 118, 119, 117, 118),  # 1.28 * 2^-7
    (1000.0, 134, 135, 135, 135, 134, 135),  # 1.953125 * 2^9
    # the ends
    (0.0, 0, 0, 0, 0, 0, 0),
    (2.0**-149, 0, 0, 0, 0, 0, 0),
    (2.0**-126, 0, 0, 0, 0, 0, 0),
    (2.0**-125, 0, 0, 0, 0, 0, 0),
    (1.75 * 2.0**-125, 0, 1, 1, 1, 0, 0),
    (2.0**-124, 1, 1, 1, 1, 0, 1),
    (LARGEST, 252, 253, 253, 253, 252, 253),
    (2.0**130, 254, 254, 254, 254, 254, 254),  # beyond float32: 255 would be NaN
    (math.inf, 255, 255, 255, 255, 255, 255),
    (math.nan, 255, 255, 255, 255, 255, 255),
]
RULES = ("floor", "even", "rceil", "ceil", "floor6", "uos")


@pytest.mark.parametrize(
    ("amax", "rule", "byte"),
    [
        (amax, ScaleRule(rule), byte)
        for amax, *row in BYTES_BY_AMAX
        for rule, byte in zip(RULES, row, strict=True)
    ],
)
def test_scale_byte(amax, rule, byte):
    assert reference.scale_byte(amax, rule) == byte


def test_every_rule_has_a_column():
    assert sorted(RULES) == sorted(rule.value for rule in ScaleRule)


MAGNITUDE_CODES = [
    (0.0, 0),
    (0.25, 0),  # tie
    (0.25 + 2.0**-26, 1),
    (0.5, 1),
    (0.75 - 2.0**-25, 1),
    (0.75, 2),  # tie
    (1.0, 2),
    (1.25, 2),  # tie
    (1.25 + 2.0**-23, 3),
    (1.5, 3),
    (1.75 - 2.0**-23, 3),
    (1.75, 4),  # tie
    (2.0, 4),
    (2.5, 4),  # tie
    (2.5 + 2.0**-22, 5),
    (3.0, 5),
    (3.5 - 2.0**-22, 5),
    (3.5, 6),  # tie
    (4.0, 6),
    (5.0, 6),  # tie
    (5 + ULP, 7),
    (6.0, 7),
    (7.99, 7),
    (1e30, 7),
    (2.0**-149, 0),
]


@pytest.mark.parametrize(("value", "code"), MAGNITUDE_CODES)
def test_element_code(value, code):
    assert reference.element_code(value, 127) == code
    assert reference.element_code(-value, 127) == code + 8


@pytest.mark.parametrize(
    ("value", "byte", "code"),
    [
        (2.0**-126, 0, 4),  # 2 * 2^-127
        (-(2.0**-128), 0, 9),  # 0.5 * 2^-127
        (2.0**-129, 0, 0),  # a tie of 0 and 0.5
        (2.0**-129 + 2.0**-149, 0, 1),
        (2.0**-149, 0, 0),
        (2.0**127, 254, 2),
        (LARGEST, 254, 4),
        (1.75 * 2.0**127, 253, 6),
        (-1.0, 125, 14),
        (1.0, 128, 1),
        (-1.0, 129, 8),  # a tie of 0 and 0.5: the sign stays
    ],
)
def test_element_code_under_other_scales(value, byte, code):
    assert reference.element_code(value, byte) == code


def test_a_block():
    values = [7.0, -6.0, 5.0, -3.5, 1.2, 0.3, -0.1, -0.0, *[0.0] * 24]
    tail = [0] * 24
    assert reference.quantize_block(values, ScaleRule.FLOOR) == (
        127,
        [7, 15, 6, 14, 2, 1, 8, 8, *tail],
    )
    # scale 2: 3.5 -3 2.5 -1.75 .6 .15 -.05 -0
    assert reference.quantize_block(values, ScaleRule.EVEN) == (
        128,
        [6, 13, 4, 12, 1, 0, 8, 8, *tail],
    )
    # scale 1/2 twice as far out: 14 -12 10 -7 2.4 .6 -.2 -0, with a maximum of 5.9
    assert reference.quantize_block([5.9, *values[4:], *[0.0] * 3], ScaleRule.FLOOR6) == (
        126,
        [7, 4, 1, 8, 8, *tail, *[0] * 3],
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", ScaleRule)
def test_a_block_that_is_not_finite(rule, poison):
    assert reference.quantize_block([1.0] * 31 + [poison], rule) == (255, [0] * 32)


def test_a_zero_block_keeps_its_signs():
    assert reference.quantize_block([0.0, -0.0] * 16, ScaleRule.FLOOR) == (0, [0, 8] * 16)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_block_has_32_elements(length):
    with pytest.raises(ValueError, match=f"32 elements, not {length}"):
        reference.quantize_block([1.0] * length, ScaleRule.FLOOR)


@pytest.mark.parametrize(
    ("code", "byte", "value"),
    [
        (0, 127, Fraction(0)),
        (1, 127, Fraction(1, 2)),
        (2, 127, Fraction(1)),
        (3, 127, Fraction(3, 2)),
        (4, 127, Fraction(2)),
        (5, 127, Fraction(3)),
        (6, 127, Fraction(4)),
        (7, 127, Fraction(6)),
        (8, 127, Fraction(0)),
        (9, 127, Fraction(-1, 2)),
        (15, 127, Fraction(-6)),
        (15, 128, Fraction(-12)),
        (5, 126, Fraction(3, 2)),
        (1, 0, Fraction(1, 2**128)),
        (7, 254, Fraction(6 * 2**127)),
        (0, 255, None),
        (15, 255, None),
    ],
)
def test_element_value(code, byte, value):
    assert reference.element_value(code, byte) == value


def test_the_memory_of_these_tests_changes_no_answer(exact):
    """`exact` is what the exhaustive tests compare with, so it is held against its source."""
    draw = random.Random(20)
    for _ in range(150):
        exponent = draw.randrange(256)  # 255 makes NaN and Inf
        bits = [
            draw.getrandbits(1) << 31
            | max(exponent - draw.randrange(8), 0) << 23
            | draw.getrandbits(7) << 16
            | draw.choice((0, 0, draw.getrandbits(16)))
            for _ in range(32)
        ]
        values = list(struct.unpack("<32f", struct.pack("<32I", *bits)))
        rule = draw.choice(list(ScaleRule))
        assert exact.quantize_block(values, rule) == reference.quantize_block(values, rule)
    for value in (0.0, -0.0, 2.0**-149, -(2.0**-149), LARGEST, -LARGEST, 5.0, -5.0):
        for byte in (0, 1, 126, 127, 128, 253, 254):
            assert exact.element_code(value, byte) == reference.element_code(value, byte)
