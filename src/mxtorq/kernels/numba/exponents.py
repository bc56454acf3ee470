"""The search over three exponents compiled for CPUs: `rounding.exponents`, the same bits.

A block of 32 and its squared errors stay in registers and the first-level cache, where torch writes
a tensor for each step. The sum halves its 32 terms five times, as the eager version does, since
float64 sums of another order may choose another exponent at a tie.
"""

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK, E2M1_EMAX, E8M0_MAX
from mxtorq.kernels.numba.compile import kernel
from mxtorq.kernels.numba.pool import over_rows

_LEAST = 2048  # blocks that are worth a thread
_SIX, _FOUR, _TWO, _ONE = (np.float32(x) for x in (6, 4, 2, 1))
_SHIFT = np.float32(2.0**22 + 3.0)  # as in `formats.e2m1`
_INF_BITS, _NAN_BITS, _ABS = (np.int32(x) for x in (0x7F800000, 0x7FC00000, 0x7FFFFFFF))
_LEAST_SCALE = np.int32(1 << 22)  # the bits of 2^-127


def search_exponents(blocks: Float32[Tensor, "n 32"], rule: ScaleRule) -> Float32[Tensor, " n"]:
    """As `rounding.exponents.search_exponents`, for CPU tensors."""
    values = blocks.contiguous().numpy()
    scales = torch.empty(len(blocks), dtype=torch.float32)
    add, found = np.int32(rule.card.add), scales.numpy()
    over_rows(lambda start, stop: _search(values, add, found, start, stop), len(blocks), _LEAST)
    return scales


@kernel
def _search(values, add, scales, start, stop):  # type: ignore[no-untyped-def]
    value_bits, scale_bits = values.view(np.int32), scales.view(np.int32)
    squares = np.empty(BLOCK, np.float64)
    trial = np.empty(1, np.float32)
    trial_bits = trial.view(np.int32)
    for n in range(start, stop):
        largest = np.int32(0)
        for i in range(BLOCK):
            largest = max(largest, value_bits[n, i] & _ABS)
        if largest >= _INF_BITS:
            scale_bits[n] = _NAN_BITS
            continue
        own = min(max(((largest + add) >> 23) - E2M1_EMAX, 0), E8M0_MAX)
        least = 0.0
        for step in range(3):  # the rule's own, its half, its double
            byte = own if step == 0 else (max(own - 1, 0) if step == 1 else min(own + 1, E8M0_MAX))
            trial_bits[0] = byte << 23 if byte > 0 else _LEAST_SCALE
            scale = trial[0]
            for i in range(BLOCK):
                multiple = values[n, i] / scale
                size = abs(multiple)
                size = size if size <= _SIX else _SIX
                power = _ONE if size < _TWO else (_TWO if size < _FOUR else _FOUR)
                nearest = (size + power * _SHIFT) - power * _SHIFT
                # The sign of a zero is lost in the square.
                rounded = np.float64((-nearest if multiple < 0 else nearest) * scale)
                error = rounded - np.float64(values[n, i])
                squares[i] = error * error
            half = BLOCK // 2
            while half:
                for i in range(half):
                    squares[i] += squares[i + half]
                half //= 2
            if step == 0 or squares[0] < least:
                least = squares[0]
                scales[n] = scale
