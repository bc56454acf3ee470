"""The exact reference with a memory: its own answers, each computed once a run.

One element in Fractions costs some 70 microseconds and the exhaustive tests ask for millions. An
element's code depends only on value / scale, and that division is exact in float64 for every
float32 and every scale byte (exponents stay within -149 - 127 and 127 + 127), so codes are
remembered by the quotient. `test_reference` checks that the memory changes no answer.
"""

import functools
import math
from types import SimpleNamespace

import pytest

from mxtorq.formats import reference
from mxtorq.formats.spec import E8M0_BIAS, E8M0_NAN


@functools.cache
def _code_of_quotient(magnitude: float, negative: bool) -> int:
    # The sign is an argument of its own: as keys of a cache 0.0 and -0.0 are one.
    return reference.element_code(-magnitude if negative else magnitude, E8M0_BIAS)


def _element_code(value, byte):
    quotient = math.ldexp(value, E8M0_BIAS - byte)
    return _code_of_quotient(abs(quotient), math.copysign(1.0, quotient) < 0)


_scale_byte = functools.cache(reference.scale_byte)


def _quantize_block(values, rule):
    if not all(map(math.isfinite, values)):
        return E8M0_NAN, [0] * len(values)
    byte = _scale_byte(max(map(abs, values)), rule)
    return byte, [_element_code(v, byte) for v in values]


@pytest.fixture(scope="session")
def exact():
    """`scale_byte`, `element_code` and `quantize_block` of the reference, remembered."""
    return SimpleNamespace(
        scale_byte=_scale_byte, element_code=_element_code, quantize_block=_quantize_block
    )
