"""The inner step of coordinate descent compiled for CPUs: `rounding.descent`, the same bits.

As for GPTQ's group step: 64 rows of the weight at a time, so that the slopes of 32 columns stay in
the first-level cache through all 496 updates, and each product and each sum is rounded by itself.
"""

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.numba.compile import kernel
from mxtorq.kernels.numba.pool import over_rows

_TILE = 64
_LEAST = 256  # rows that are worth a thread
_ZERO, _ONE, _TWO, _FOUR, _SIX = (np.float32(x) for x in (0, 1, 2, 4, 6))
_SHIFT = np.float32(2.0**22 + 3.0)  # as in `formats.e2m1`


def move_group_(
    values: Float32[Tensor, "32 rows"],
    slopes: Float32[Tensor, "32 rows"],
    codes: UInt8[Tensor, "32 rows"],
    scale: Float32[Tensor, " rows"],
    pull: Float32[Tensor, "32 32"],
) -> Float32[Tensor, "32 rows"]:
    """As `rounding.descent.move_group_`, for contiguous CPU tensors."""
    steps = torch.empty_like(values)
    arrays = [part.numpy() for part in (values, slopes, codes, scale, pull, steps)]

    def work(start: int, stop: int) -> None:
        _move_rows(*arrays, start, stop)

    over_rows(work, values.shape[1], _LEAST)
    return steps


@kernel
def _move_rows(values, slopes, codes, scales, pull, steps, start, stop):  # type: ignore[no-untyped-def]
    tile = np.empty((BLOCK, _TILE), np.float32)
    scale = np.empty(_TILE, np.float32)
    step = np.empty(_TILE, np.float32)
    multiple = np.empty(_TILE, np.float32)
    sign_bits = multiple.view(np.int32)
    for first in range(start, stop, _TILE):
        n = min(_TILE, stop - first)
        for r in range(n):
            scale[r] = scales[first + r]
        for j in range(BLOCK):
            for r in range(n):
                tile[j, r] = slopes[j, first + r]
        for j in range(BLOCK):
            for r in range(n):
                slopes[j, first + r] = tile[j, r]
                multiple[r] = (values[j, first + r] - tile[j, r]) / scale[r]
            for r in range(n):
                size = abs(multiple[r])
                size = size if size <= _SIX else _SIX  # NaN too
                power = _ONE if size < _TWO else (_TWO if size < _FOUR else _FOUR)
                nearest = (size + power * _SHIFT) - power * _SHIFT
                code = np.int32(nearest * (_TWO / power)) + (np.int32(power) & 6)
                code += (sign_bits[r] >> 28) & 8
                value = (-nearest if sign_bits[r] < 0 else nearest) * scale[r]
                change = value - values[j, first + r]
                taken = abs(tile[j, r] + change) < abs(tile[j, r])
                codes[j, first + r] = np.uint8(code) if taken else codes[j, first + r]
                values[j, first + r] = value if taken else values[j, first + r]
                step[r] = change if taken else _ZERO
                steps[j, first + r] = step[r]
            for k in range(j + 1, BLOCK):
                part = pull[k, j]
                for r in range(n):
                    tile[k, r] += part * step[r]
