"""Multiply each MX block by a 32 x 32 matrix, and round it while it is in registers.

One matrix for all blocks, or one for each block of a token. Two blocks are worked on together, each
the sum over k of x_k times row k of the matrix: on AVX2 that is eight independent sums, which keep
both multipliers busy and leave registers for the matrix.

A sum is a chain of fused multiply-adds from k = 0 upwards, rounded once a step. A BLAS is free to
sum in another order, although MKL does just this for 32 terms: eager results are equal bit for bit
where the BLAS has that order, and within 32 roundings in any case.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, as_blocks, check_out, fresh
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.numba.compile import kernel
from mxtorq.kernels.numba.lanes import (
    amax_bits,
    encode,
    fma,
    inverse_power,
    load,
    nearest,
    power,
    scale_byte,
    spread,
    store,
    store_packed,
)
from mxtorq.kernels.numba.mxfp4 import ADD, LEAST_BLOCKS, bits_of
from mxtorq.kernels.numba.pool import over_rows

TILE = 32
"""Tokens that meet a matrix before the next one is read: an even number of rows that stay in the
second-level cache."""


@kernel
def _pair(blocks: Any, one: int, other: int, matrices: Any, row: int, scratch: Any) -> Any:
    """Blocks ``one`` and ``other`` times the matrix that begins at ``row``."""
    store(scratch, 0, load(blocks, one))
    store(scratch, 1, load(blocks, other))
    values = scratch.view(np.float32)
    first, second = spread(np.float32(0)), spread(np.float32(0))
    for k in range(32):
        line = load(matrices, row + k)
        first = fma(spread(values[0, k]), line, first)
        second = fma(spread(values[1, k]), line, second)
    return first, second


@kernel
def _to_values(
    blocks: Any, wide: int, matrices: Any, add: Any, rounds: bool, out: Any, start: int, stop: int
) -> None:
    scratch = np.empty((2, 32), np.int32)
    for tile in range(start, stop, TILE):
        last = min(tile + TILE, stop)
        for place in range(wide):
            for token in range(tile, last, 2):
                one = token * wide + place
                other = min(token + 1, last - 1) * wide + place
                pair = _pair(blocks, one, other, matrices, 32 * place, scratch)
                for at, bits in ((one, pair[0]), (other, pair[1])):
                    if rounds:
                        byte = scale_byte(amax_bits(bits), add)
                        store(out, at, nearest(bits, inverse_power(byte), power(byte)))
                    else:
                        store(out, at, bits)


@kernel
def _to_codes(
    blocks: Any, wide: int, matrices: Any, add: Any, packed: Any, scales: Any, start: int, stop: int
) -> None:
    scratch = np.empty((2, 32), np.int32)
    for tile in range(start, stop, TILE):
        last = min(tile + TILE, stop)
        for place in range(wide):
            for token in range(tile, last, 2):
                one = token * wide + place
                other = min(token + 1, last - 1) * wide + place
                pair = _pair(blocks, one, other, matrices, 32 * place, scratch)
                for at, bits in ((one, pair[0]), (other, pair[1])):
                    byte = scale_byte(amax_bits(bits), add)
                    scales[at] = byte
                    if byte == 255:
                        packed[at] = 0
                    else:
                        store_packed(packed, at, encode(bits, inverse_power(byte)))


def rotate(
    values: Float32[Tensor, "*rows d"],
    matrices: Float32[Tensor, "m 32 32"],
    out: Float32[Tensor, "*rows d"] | None = None,
) -> Float32[Tensor, "*rows d"]:
    """Each block of 32 times its matrix.

    Args:
        values: what is rotated.
        matrices: one for all blocks, or d / 32 of them.
        out: memory for the result; may be ``values``.

    Raises:
        FormatError: 32 does not divide d, or ``out`` does not fit.
    """
    return _values(values, matrices, None, out)


def rotate_fake_quantize(
    values: Float[Tensor, "*rows d"],
    matrices: Float32[Tensor, "m 32 32"],
    rule: ScaleRule = ScaleRule.FLOOR,
    out: Float[Tensor, "*rows d"] | None = None,
) -> Float[Tensor, "*rows d"]:
    """`rotate` in float32, rounded to MXFP4 values in the dtype of ``values``.

    Raises:
        FormatError: as `rotate`; or a dtype that is neither float32 nor bfloat16.
    """
    return _values(values, matrices, rule, out)


def rotate_quantize(
    values: Float[Tensor, "*rows d"],
    matrices: Float32[Tensor, "m 32 32"],
    rule: ScaleRule = ScaleRule.FLOOR,
) -> MXFP4:
    """`rotate` in float32, rounded to MXFP4 codes.

    Raises:
        FormatError: as `rotate`.
    """
    blocks = as_blocks(values, (torch.float32, torch.bfloat16))
    packed = fresh(torch.Size((len(blocks), BLOCK // 2)), torch.uint8, blocks.device)
    scales = torch.empty(len(blocks), dtype=torch.uint8)
    wide, lines = len(matrices), bits_of(matrices.reshape(-1, BLOCK))
    arrays = (bits_of(blocks), wide, lines, ADD[rule], packed.numpy(), scales.numpy())
    over_rows(
        lambda start, stop: _to_codes(*arrays, start, stop),
        len(blocks) // wide,
        LEAST_BLOCKS // wide,
    )
    *rows, width = values.shape
    return MXFP4(packed.view(*rows, width // 2), scales.view(*rows, width // BLOCK))


def _values(values: Tensor, matrices: Tensor, rule: ScaleRule | None, out: Tensor | None) -> Tensor:
    blocks = as_blocks(values, (torch.float32, torch.bfloat16))
    result = check_out(out, values.shape, values.dtype, values.device)
    wide, lines = len(matrices), bits_of(matrices.reshape(-1, BLOCK))
    add, target = ADD[rule or ScaleRule.FLOOR], bits_of(result.view(-1, BLOCK))
    arrays = (bits_of(blocks), wide, lines, add, rule is not None, target)
    over_rows(
        lambda start, stop: _to_values(*arrays, start, stop),
        len(blocks) // wide,
        LEAST_BLOCKS // wide,
    )
    return result
