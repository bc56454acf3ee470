"""MXFP4 in exact arithmetic: slow, obvious, and the judge of everything fast.

Fractions and loops, one definition a function, no bit tricks: a reader checks it against OCP MX
v1.0 (5.3.3, 5.4.1, 6.3) line by line. Used by tests, by the golden vectors and by anyone who
doubts a byte. Floating point would not do: an fp64 search for the nearest of eight values goes
wrong on subnormals and ties.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import (
    BLOCK,
    E2M1_MAGNITUDES,
    E2M1_SIGN,
    E8M0_BIAS,
    E8M0_MAX,
    E8M0_NAN,
)


def floor_log2(x: Fraction) -> int:
    """The largest integer e with 2^e <= x, for x > 0."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def ceil_log2(x: Fraction) -> int:
    """The smallest integer e with x <= 2^e, for x > 0."""
    e = floor_log2(x)
    return e if Fraction(2) ** e == x else e + 1


def _round_to_one_fraction_bit(x: Fraction) -> Fraction:
    quantum = Fraction(2) ** (floor_log2(x) - 1)
    return round(x / quantum) * quantum  # Python rounds a Fraction half to even


def scale_exponent(amax: Fraction, rule: ScaleRule) -> int:
    """The unclamped exponent e of the scale 2^e that a rule gives to amax > 0."""
    match rule:
        case ScaleRule.FLOOR:
            return floor_log2(amax) - 2
        case ScaleRule.EVEN:
            return floor_log2(_round_to_one_fraction_bit(amax)) - 2
        case ScaleRule.RCEIL:
            return ceil_log2(amax / 6)
        case ScaleRule.CEIL:
            return ceil_log2(amax) - 2
        case ScaleRule.FLOOR6:
            return floor_log2(amax / 6)
        case ScaleRule.UOS:
            return ceil_log2(amax / Fraction(29, 4))


def scale_byte(amax: float, rule: ScaleRule) -> int:
    """The E8M0 byte of a block whose largest magnitude is ``amax``."""
    if not math.isfinite(amax):
        return E8M0_NAN
    if amax == 0:
        return 0
    return min(max(scale_exponent(Fraction(amax), rule) + E8M0_BIAS, 0), E8M0_MAX)


def element_code(value: float, byte: int) -> int:
    """The E2M1 code of a finite value under a scale byte 0..254: nearest, ties to the even code."""
    x = abs(Fraction(value)) / Fraction(2) ** (byte - E8M0_BIAS)
    distances = [abs(Fraction(m) - x) for m in E2M1_MAGNITUDES]
    nearest = [code for code in range(8) if distances[code] == min(distances)]
    magnitude = next(code for code in nearest if len(nearest) == 1 or code % 2 == 0)
    return magnitude | (E2M1_SIGN if math.copysign(1.0, value) < 0 else 0)


def quantize_block(values: Sequence[float], rule: ScaleRule) -> tuple[int, list[int]]:
    """Scale byte and the 32 element codes of one block."""
    if len(values) != BLOCK:
        raise ValueError(f"a block has {BLOCK} elements, not {len(values)}")
    if not all(math.isfinite(v) for v in values):
        return E8M0_NAN, [0] * BLOCK
    byte = scale_byte(max(abs(v) for v in values), rule)
    return byte, [element_code(v, byte) for v in values]


def element_value(code: int, byte: int) -> Fraction | None:
    """The exact value of a code under a scale byte; None stands for NaN."""
    if byte == E8M0_NAN:
        return None
    magnitude = Fraction(E2M1_MAGNITUDES[code & 7]) * Fraction(2) ** (byte - E8M0_BIAS)
    return -magnitude if code & E2M1_SIGN else magnitude
