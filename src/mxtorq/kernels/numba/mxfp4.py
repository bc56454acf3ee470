"""`formats.mxfp4` on a CPU, a block in registers: each value is read once and written once.

Same names, same arguments, same bits, errors included: what is refused is decided by the functions
of `formats`. Results larger than the caches are written past them, which saves reading memory that
is about to be overwritten: that is most of the way from copying speed to twice that.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, as_blocks, check_out, check_parts, fresh
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.numba.compile import kernel
from mxtorq.kernels.numba.lanes import (
    amax_bits,
    decode,
    encode,
    half_power,
    inverse_power,
    load,
    load_packed,
    nearest,
    power,
    scale_byte,
    store,
    store_packed,
    stream,
    stream_decoded,
)
from mxtorq.kernels.numba.pool import over_rows

LEAST_BLOCKS = 2048
"""Blocks that are worth a thread of their own."""

TOGETHER = 16
"""Blocks whose scales are chosen before the first of them is rounded."""

_STREAMED_BYTES = 1 << 22
_ALIGNMENT = 32
ADD = {rule: np.int32(rule.card.add) for rule in ScaleRule}
"""What `scale_byte` adds under each rule."""


# Two loops over a few blocks: the scales of all, then the values of all. In one loop each block
# would wait for its own scale, a chain of some forty cycles that cannot overlap with the next.


@kernel
def _quantize(blocks: Any, add: Any, packed: Any, scales: Any, start: int, stop: int) -> None:
    inverse = np.empty(TOGETHER, np.float32)
    for first in range(start, stop, TOGETHER):
        many = min(TOGETHER, stop - first)
        for at in range(many):
            byte = scale_byte(amax_bits(load(blocks, first + at)), add)
            scales[first + at] = byte
            inverse[at] = inverse_power(byte)
        for at in range(many):
            if scales[first + at] == 255:
                packed[first + at] = 0
            else:
                store_packed(packed, first + at, encode(load(blocks, first + at), inverse[at]))


@kernel
def _fake_quantize(blocks: Any, add: Any, out: Any, start: int, stop: int) -> None:
    inverse, scale = np.empty(TOGETHER, np.float32), np.empty(TOGETHER, np.float32)
    for first in range(start, stop, TOGETHER):
        many = min(TOGETHER, stop - first)
        for at in range(many):
            byte = scale_byte(amax_bits(load(blocks, first + at)), add)
            inverse[at], scale[at] = inverse_power(byte), power(byte)
        for at in range(many):
            store(out, first + at, nearest(load(blocks, first + at), inverse[at], scale[at]))


@kernel
def _fake_quantize_stream(blocks: Any, add: Any, out: Any, start: int, stop: int) -> None:
    inverse, scale = np.empty(TOGETHER, np.float32), np.empty(TOGETHER, np.float32)
    for first in range(start, stop, TOGETHER):
        many = min(TOGETHER, stop - first)
        for at in range(many):
            byte = scale_byte(amax_bits(load(blocks, first + at)), add)
            inverse[at], scale[at] = inverse_power(byte), power(byte)
        for at in range(many):
            stream(out, first + at, nearest(load(blocks, first + at), inverse[at], scale[at]))


@kernel
def _dequantize(packed: Any, scales: Any, out: Any, start: int, stop: int) -> None:
    for block in range(start, stop):
        store(out, block, decode(load_packed(packed, block), half_power(np.int32(scales[block]))))


@kernel
def _dequantize_stream(packed: Any, scales: Any, out: Any, start: int, stop: int) -> None:
    for block in range(start, stop):
        stream(out, block, decode(load_packed(packed, block), half_power(np.int32(scales[block]))))


@kernel
def _dequantize_narrow(packed: Any, scales: Any, out: Any, start: int, stop: int) -> None:
    """To bfloat16, past the caches."""
    for block in range(start, stop):
        exponent = np.int32(scales[block]) - np.int32(127)
        codes = load_packed(packed, block)
        if abs(exponent) <= 125:
            stream_decoded(out, block, codes, exponent)
        else:
            stream(out, block, decode(codes, half_power(exponent + np.int32(127))))


def quantize(values: Float[Tensor, "*rows d"], rule: ScaleRule = ScaleRule.FLOOR) -> MXFP4:
    """`formats.mxfp4.quantize`.

    Raises:
        FormatError: as there.
    """
    blocks = as_blocks(values)
    if blocks.dtype == torch.float16:
        blocks = blocks.float()
    packed = fresh(torch.Size((len(blocks), BLOCK // 2)), torch.uint8, blocks.device)
    scales = torch.empty(len(blocks), dtype=torch.uint8)
    whole = (bits_of(blocks), ADD[rule], packed.numpy(), scales.numpy())
    over_blocks(_quantize, len(blocks), *whole)
    *rows, width = values.shape
    return MXFP4(packed.view(*rows, width // 2), scales.view(*rows, width // BLOCK))


def fake_quantize(
    values: Float[Tensor, "*rows d"],
    rule: ScaleRule = ScaleRule.FLOOR,
    out: Float[Tensor, "*rows d"] | None = None,
) -> Float[Tensor, "*rows d"]:
    """`formats.mxfp4.fake_quantize`. ``out`` may be ``values``.

    Raises:
        FormatError: as there.
    """
    blocks = as_blocks(values, (torch.float32, torch.bfloat16))
    result = check_out(out, values.shape, values.dtype, values.device)
    run = _fake_quantize_stream if streamed(result) else _fake_quantize
    target = bits_of(result.view(-1, BLOCK))
    over_blocks(run, len(blocks), bits_of(blocks), ADD[rule], target)
    return result


def dequantize(
    quantized: MXFP4,
    dtype: torch.dtype = torch.float32,
    out: Float[Tensor, "*rows d"] | None = None,
) -> Float[Tensor, "*rows d"]:
    """`formats.mxfp4.dequantize` to float32 or bfloat16.

    Raises:
        FormatError: as there.
    """
    check_parts(quantized, dtype)
    packed, scales = quantized
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    result = check_out(out, torch.Size(shape), dtype, packed.device)
    run = _dequantize_stream if streamed(result) else _dequantize
    if streamed(result) and dtype == torch.bfloat16:
        run = _dequantize_narrow
    parts = (packed.reshape(-1, BLOCK // 2).numpy(), scales.reshape(-1).numpy())
    over_blocks(run, scales.numel(), *parts, bits_of(result.view(-1, BLOCK)))
    return result


def over_blocks(run: Callable[..., None], blocks: int, *arrays: Any) -> None:
    """A kernel of arrays, start and stop over all blocks."""
    over_rows(lambda start, stop: run(*arrays, start, stop), blocks, LEAST_BLOCKS)


def streamed(result: Tensor) -> bool:
    """Whether a result is written past the caches."""
    large = result.numel() * result.element_size() >= _STREAMED_BYTES
    return large and result.data_ptr() % _ALIGNMENT == 0


def bits_of(blocks: Float[Tensor, "n 32"]) -> NDArray[Any]:
    """The same memory as integers of the same size, for NumPy knows no bfloat16."""
    whole = torch.int32 if blocks.dtype == torch.float32 else torch.int16
    array: NDArray[Any] = blocks.detach().contiguous().view(whole).numpy()
    return array
