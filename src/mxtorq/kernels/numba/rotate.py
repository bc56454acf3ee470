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
"""Blocks that are rotated before the first is rounded: they stay in a core's first cache."""

_TILE_OF_MANY = 8
"""The same for matrices of their own, where the blocks of a tile lie a token apart: more of them
would take each other's places in that cache."""


@kernel
def _rotate_tile(
    blocks: Any, wide: int, place: int, first: int, many: int, matrices: Any, tile: Any
) -> None:
    """Block ``place`` of ``many`` tokens times its matrix, into the first rows of ``tile``."""
    inputs = np.empty((2, 32), np.int32)
    values, row = inputs.view(np.float32), 32 * place
    for token in range(0, many, 2):
        other = min(token + 1, many - 1)
        store(inputs, 0, load(blocks, (first + token) * wide + place))
        store(inputs, 1, load(blocks, (first + other) * wide + place))
        one, two = spread(np.float32(0)), spread(np.float32(0))
        for k in range(32):
            line = load(matrices, row + k)
            one = fma(spread(values[0, k]), line, one)
            two = fma(spread(values[1, k]), line, two)
        store(tile, token, one)
        store(tile, other, two)


@kernel
def _to_values(
    blocks: Any, wide: int, matrices: Any, add: Any, rounds: bool, out: Any, start: int, stop: int
) -> None:
    tile = np.empty((TILE, 32), np.int32)
    inverse, scale = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    step = TILE if wide == 1 else _TILE_OF_MANY
    for first in range(start, stop, step):
        many = min(step, stop - first)
        for place in range(wide):
            _rotate_tile(blocks, wide, place, first, many, matrices, tile)
            if rounds:
                for at in range(many):
                    byte = scale_byte(amax_bits(load(tile, at)), add)
                    inverse[at], scale[at] = inverse_power(byte), power(byte)
                for at in range(many):
                    rounded = nearest(load(tile, at), inverse[at], scale[at])
                    store(out, (first + at) * wide + place, rounded)
            else:
                for at in range(many):
                    store(out, (first + at) * wide + place, load(tile, at))


@kernel
def _to_codes(
    blocks: Any, wide: int, matrices: Any, add: Any, packed: Any, scales: Any, start: int, stop: int
) -> None:
    tile = np.empty((TILE, 32), np.int32)
    inverse = np.empty(TILE, np.float32)
    step = TILE if wide == 1 else _TILE_OF_MANY
    for first in range(start, stop, step):
        many = min(step, stop - first)
        for place in range(wide):
            _rotate_tile(blocks, wide, place, first, many, matrices, tile)
            for at in range(many):
                byte = scale_byte(amax_bits(load(tile, at)), add)
                scales[(first + at) * wide + place] = byte
                inverse[at] = inverse_power(byte)
            for at in range(many):
                block = (first + at) * wide + place
                if scales[block] == 255:
                    packed[block] = 0
                else:
                    store_packed(packed, block, encode(load(tile, at), inverse[at]))


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
