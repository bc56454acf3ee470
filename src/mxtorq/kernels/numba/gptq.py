"""GPTQ's group step compiled for CPUs: `rounding.group`, the same bits.

Rows of the weight are independent of each other, columns are not. A group's columns come as
[32, rows], one column of the weight a row, so the kernel takes 64 rows of the weight at a time: 32
short vectors that stay in the first-level cache through all 496 updates. Products and differences
are rounded one after the other, as two torch calls do: a fused multiply-add would give other codes
now and then.
"""

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK, E2M1_EMAX, E8M0_MAX
from mxtorq.kernels.numba.compile import kernel
from mxtorq.kernels.numba.pool import over_rows

_TILE = 64
_LEAST = 256  # rows that are worth a thread
_SIX, _FOUR, _TWO, _ONE = (np.float32(x) for x in (6, 4, 2, 1))
_SHIFT = np.float32(2.0**22 + 3.0)  # as in `formats.e2m1`
_INF_BITS, _NAN_BITS, _ABS = (np.int32(x) for x in (0x7F800000, 0x7FC00000, 0x7FFFFFFF))
_LEAST_SCALE = np.int32(1 << 22)  # the bits of 2^-127


def fix_group_(
    columns: Float32[Tensor, "32 rows"],
    follow: Float32[Tensor, "32 32"],
    scales: Float32[Tensor, "blocks rows"],
    groups: list[int],
    rule: ScaleRule | None,
) -> UInt8[Tensor, "32 rows"]:
    """As `rounding.group.fix_group_`, for contiguous CPU tensors."""
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    arrays = columns.numpy(), follow.numpy(), scales.numpy(), np.array(groups), codes.numpy()
    add = np.int32(0 if rule is None else rule.card.add)

    def work(start: int, stop: int) -> None:
        _fix_rows(*arrays, add, rule is not None, start, stop)

    over_rows(work, columns.shape[1], _LEAST)
    return codes


@kernel
def _fix_rows(columns, follow, scales, groups, codes, add, choose, start, stop):  # type: ignore[no-untyped-def]
    tile = np.empty((BLOCK, _TILE), np.float32)
    error = np.empty(_TILE, np.float32)
    multiple = np.empty(_TILE, np.float32)
    scale = np.empty(_TILE, np.float32)
    largest = np.empty(_TILE, np.int32)
    tile_bits = tile.view(np.int32)
    sign_bits = multiple.view(np.int32)
    scale_bits = scale.view(np.int32)
    for first in range(start, stop, _TILE):
        n = min(_TILE, stop - first)
        for j in range(BLOCK):
            for r in range(n):
                tile[j, r] = columns[j, first + r]
        if choose:
            for r in range(n):
                largest[r] = 0
            for j in range(BLOCK):
                for r in range(n):
                    largest[r] = max(largest[r], tile_bits[j, r] & _ABS)
            for r in range(n):
                byte = ((largest[r] + add) >> 23) - E2M1_EMAX
                byte = min(max(byte, 0), E8M0_MAX)
                bits = byte << 23 if byte > 0 else _LEAST_SCALE
                scale_bits[r] = bits if largest[r] < _INF_BITS else _NAN_BITS
            for r in range(n):
                scales[groups[0], first + r] = scale[r]
        for j in range(BLOCK):
            if not choose:
                for r in range(n):
                    scale[r] = scales[groups[j], first + r]
            for r in range(n):
                multiple[r] = tile[j, r] / scale[r]
            for r in range(n):
                size = abs(multiple[r])
                size = size if size <= _SIX else _SIX  # NaN too
                power = _ONE if size < _TWO else (_TWO if size < _FOUR else _FOUR)
                nearest = (size + power * _SHIFT) - power * _SHIFT
                steps = np.int32(nearest * (_TWO / power))
                rank = np.int32(power) & 6  # twice the logarithm of 1, 2 and 4
                sign = (sign_bits[r] >> 28) & 8
                codes[j, first + r] = np.uint8(steps + rank + sign)
                value = (-nearest if sign_bits[r] < 0 else nearest) * scale[r]
                error[r] = tile[j, r] - value
                columns[j, first + r] = value
            for k in range(j + 1, BLOCK):
                part = follow[j, k]
                for r in range(n):
                    tile[k, r] -= part * error[r]
