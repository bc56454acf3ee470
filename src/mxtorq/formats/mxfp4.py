"""Tensors in MXFP4: blocks of 32 along the last axis, one E8M0 scale each (OCP MX v1.0, 6.3).

    quantize        float -> packed codes and scale bytes         (what a checkpoint stores)
    dequantize      packed codes and scale bytes -> float         (exact)
    fake_quantize   float -> float, as if through both            (what an activation suffers)

A block is scaled by an exact power of two and rounded once, so these functions equal the Fraction
version in `reference` bit for bit. A block with NaN or Inf gets scale 255 and codes 0, and
dequantizes to NaN; an all-zero block gets byte 0.

On a CPU the work goes through the tensor in chunks whose scratch fits a core's second-level cache:
whole fresh temporaries cost several times more in page faults than in arithmetic. Bits do not
depend on the chunk size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from mxtorq.errors import FormatError
from mxtorq.formats import e2m1, e8m0
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK, E8M0_NAN

CHUNK_BLOCKS = 8192
"""Blocks that one step works on on a CPU: 1 MiB of float32 scratch. Elsewhere 128 times more."""

_ALIGNMENT = 64  # bytes of a cache line
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class MXFP4(NamedTuple):
    """A tensor in MXFP4; its real shape is that of ``packed`` with the last axis doubled."""

    packed: UInt8[Tensor, "*rows half"]
    """Two element codes a byte, shape [..., d/2]."""
    e8m0: UInt8[Tensor, "*rows blocks"]
    """One biased scale exponent a block, shape [..., d/32]."""


def quantize(values: Float[Tensor, "*rows d"], rule: ScaleRule = ScaleRule.FLOOR) -> MXFP4:
    """Round a float32, bfloat16 or float16 tensor to MXFP4.

    Raises:
        FormatError: the last axis is not a multiple of 32, or the dtype is not one of the three
            (a float64 would be rounded twice; cast it yourself and say so).
    """
    blocks = as_blocks(values)
    packed = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=values.device)
    scales = torch.empty(len(blocks), dtype=torch.uint8, device=values.device)
    for here in chunks(blocks):
        scaled, scales[here] = _scaled(blocks[here].float(), rule)
        packed[here] = e2m1.pack(e2m1.encode(scaled))
    packed.index_fill_(0, (scales == E8M0_NAN).nonzero().flatten(), 0)
    *rows, width = values.shape
    return MXFP4(packed.view(*rows, width // 2), scales.view(*rows, width // BLOCK))


def dequantize(
    quantized: MXFP4,
    dtype: torch.dtype = torch.float32,
    out: Float[Tensor, "*rows d"] | None = None,
) -> Float[Tensor, "*rows d"]:
    """The values of an MXFP4 tensor. Exact in float32 and bfloat16 up to their largest finite value
    (a scale of 2^126 or more can make an element exceed it: that becomes Inf); NaN where the scale
    byte is 255.

    Raises:
        FormatError: the two parts do not belong together, a float16 was asked for (its range
            cannot hold E8M0 scales), or ``out`` does not fit.
    """
    check_parts(quantized, dtype)
    packed, scales = quantized
    shape = torch.Size((*packed.shape[:-1], packed.shape[-1] * 2))
    result = check_out(out, shape, dtype, packed.device)
    values = result.view(-1, BLOCK)
    rows, blocks = packed.reshape(-1, BLOCK // 2), scales.reshape(-1)
    for here in chunks(blocks):
        scale = e8m0.decode(blocks[here])[:, None]
        if dtype == torch.float64:
            values[here] = e2m1.decode_packed(rows[here], torch.float32).double() * scale
        else:
            torch.mul(e2m1.decode_packed(rows[here], dtype), scale.to(dtype), out=values[here])
    return result


def fake_quantize(
    values: Float[Tensor, "*rows d"],
    rule: ScaleRule = ScaleRule.FLOOR,
    out: Float[Tensor, "*rows d"] | None = None,
) -> Float[Tensor, "*rows d"]:
    """`dequantize(quantize(values, rule))` in the dtype of ``values``, without the packed copy.

    Args:
        values: float32 or bfloat16.
        rule: how scales are chosen.
        out: memory for the result, which may be that of ``values``. Touching fresh memory takes
            longer than rounding what goes there.

    Raises:
        FormatError: as `quantize`; float16 too, whose range cannot hold every result; or ``out``
            does not fit.
    """
    blocks = as_blocks(values, (torch.float32, torch.bfloat16))
    result = check_out(out, values.shape, values.dtype, values.device)
    target = result.view(-1, BLOCK)
    for here in chunks(blocks):
        scaled, scales = _scaled(blocks[here].float(), rule)
        target[here] = e2m1.nearest(scaled).mul_(e8m0.decode(scales)[:, None])
    return result


def chunks(rows: Tensor, blocks: int = 1) -> Iterator[slice]:
    """The first axis in steps whose scratch fits the caches (`CHUNK_BLOCKS`).

    Args:
        rows: what is gone through.
        blocks: of 32 that each row holds.
    """
    most = CHUNK_BLOCKS if rows.device.type == "cpu" else 128 * CHUNK_BLOCKS
    step = max(1, most // blocks)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _scaled(
    blocks: Float32[Tensor, "n 32"], rule: ScaleRule
) -> tuple[Float32[Tensor, "n 32"], UInt8[Tensor, " n"]]:
    scales = e8m0.encode_amax(e8m0.magnitude_bits(blocks).amax(-1), rule)
    return blocks * e8m0.decode_inverse(scales)[:, None], scales


def as_blocks(values: Tensor, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> Tensor:
    """A tensor as rows of 32.

    Raises:
        FormatError: its dtype is none of ``dtypes``, or 32 does not divide its last axis.
    """
    if values.dtype not in dtypes:
        raise FormatError(
            asked="MXFP4 from a tensor",
            found=f"dtype {values.dtype}",
            why=f"only {', '.join(map(str, dtypes))} are rounded once and exactly here",
            todo="cast to float32 first",
        )
    if values.dim() == 0 or values.shape[-1] % BLOCK or values.shape[-1] == 0:
        raise FormatError(
            asked="MXFP4 from a tensor",
            found=f"shape {tuple(values.shape)}",
            why=f"the last axis is cut into blocks of {BLOCK}",
            todo=f"pad or choose a tensor whose last axis is a multiple of {BLOCK}",
        )
    return values.reshape(-1, BLOCK)


def check_parts(quantized: MXFP4, dtype: torch.dtype) -> None:
    """Refuse codes and scales of different tensors, or a dtype that cannot hold their values.

    Raises:
        FormatError: with the shapes, or with the dtypes that can.
    """
    packed, scales = quantized
    expected = (*scales.shape[:-1], scales.shape[-1] * BLOCK // 2) if scales.dim() else None
    if packed.shape != expected or {packed.dtype, scales.dtype} != {torch.uint8}:
        raise FormatError(
            asked="the values of an MXFP4 tensor",
            found=f"packed codes {packed.dtype} {tuple(packed.shape)} and scales {scales.dtype} "
            f"{tuple(scales.shape)}",
            why="each scale byte belongs to 16 bytes of codes along the last axis",
            todo="pass the two tensors of one weight",
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise FormatError(
            asked=f"MXFP4 values as {dtype}",
            found="scales from 2^-127 to 2^127",
            why="only float32, bfloat16 and float64 have that range",
            todo="ask for one of them and cast afterwards",
        )


def fresh(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on a CPU from NumPy, which asks Linux for huge pages where it is large.

    Touching 64 MiB in pages of 4 KiB for the first time takes three times as long as in huge ones,
    and several times as long as rounding what goes there.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = shape.numel() * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return torch.from_numpy(room[start : start + size]).view(dtype).view(shape)


def check_out(
    out: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``out``, or fresh memory.

    Raises:
        FormatError: ``out`` is not contiguous, or of another shape, dtype or device.
    """
    if out is None:
        return fresh(shape, dtype, device)
    if (out.shape, out.dtype, out.device) != (shape, dtype, device) or not out.is_contiguous():
        raise FormatError(
            asked=f"a result {dtype} {tuple(shape)} on {device}",
            found=f"an out {out.dtype} {tuple(out.shape)} on {out.device}, "
            f"{'' if out.is_contiguous() else 'not '}contiguous",
            why="the result is written there as it is",
            todo="pass a contiguous tensor of that shape, dtype and device, or none",
        )
    return out
