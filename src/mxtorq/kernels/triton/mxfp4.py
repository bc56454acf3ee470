# mypy: allow-untyped-defs, allow-incomplete-defs
"""`formats.mxfp4` on GPUs: quantize, fake_quantize and dequantize in one pass over memory each.

Same names, arguments, errors and bits as the eager functions, which say what they do; ``out`` takes
a result that exists already. A program converts `_STEP` blocks: it reads them once, reduces each
block's maximum across a few threads, and writes codes and scales. The work an element is some
fifteen integer and float instructions, so on a GPU with fast memory bfloat16 input is close to
being bound by them, float32 input by memory.

What is not contiguous is copied first, as in the eager version.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, as_blocks, check_parts
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.triton.compile import OPTIONS, bits, kernel, on_device, result
from mxtorq.kernels.triton.elements import (
    as_bits,
    as_float,
    decode,
    fake_quantize_tile,
    float_bits,
    power,
    quantize_tile,
    store_bits,
)

_STEP = 64
_WARPS = 4


@kernel
def quantize_kernel(values, packed, scales, blocks, add, STEP: tl.constexpr):
    """float -> packed codes and scale bytes, STEP blocks a program."""
    start = tl.program_id(0).to(tl.int64) * STEP
    row = tl.arange(0, STEP)
    inside = row < blocks - start
    at = row[:, None] * 32 + tl.arange(0, 32)[None, :]
    loaded = tl.load(values + start * 32 + at, mask=inside[:, None], other=0)
    codes, byte = quantize_tile(float_bits(loaded), add)
    at = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(packed + start * 16 + at, codes, mask=inside[:, None])
    tl.store(scales + start + row, byte, mask=inside)


@kernel
def fake_quantize_kernel(values, out, blocks, add, STEP: tl.constexpr):
    """float -> float, STEP blocks a program."""
    start = tl.program_id(0).to(tl.int64) * STEP
    row = tl.arange(0, STEP)
    inside = (row < blocks - start)[:, None]
    at = row[:, None] * 32 + tl.arange(0, 32)[None, :]
    loaded = tl.load(values + start * 32 + at, mask=inside, other=0)
    store_bits(out + start * 32 + at, fake_quantize_tile(float_bits(loaded), add), inside)


@kernel
def dequantize_kernel(packed, scales, out, blocks, STEP: tl.constexpr):
    """packed codes and scale bytes -> float, STEP blocks a program."""
    start = tl.program_id(0).to(tl.int64) * STEP
    row = tl.arange(0, STEP)
    inside = row < blocks - start
    at = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    pairs = tl.load(packed + start * 16 + at, mask=inside[:, None], other=0).to(tl.int32)
    byte = tl.load(scales + start + row, mask=inside, other=0).to(tl.int32)
    values = decode(tl.reshape(tl.join(pairs & 15, pairs >> 4), (STEP, 32)))
    scale = as_float(power(byte))[:, None]
    at = row[:, None] * 32 + tl.arange(0, 32)[None, :]
    out += start * 32
    if out.dtype.element_ty == tl.float64:  # where 6 * 2^127 is a number
        tl.store(out + at, values.to(tl.float64) * scale.to(tl.float64), mask=inside[:, None])
    else:
        store_bits(out + at, as_bits(values * scale), inside[:, None])


def quantize(values: Float[Tensor, "*rows d"], rule: ScaleRule = ScaleRule.FLOOR) -> MXFP4:
    """As `formats.mxfp4.quantize`.

    Raises:
        FormatError: as there.
    """
    rows = as_blocks(values).contiguous()
    blocks = len(rows)
    packed = torch.empty(blocks, BLOCK // 2, dtype=torch.uint8, device=values.device)
    scales = torch.empty(blocks, dtype=torch.uint8, device=values.device)
    if blocks:
        with on_device(values):
            quantize_kernel[_grid(blocks)](
                bits(rows), packed, scales, blocks, rule.card.add, STEP=_STEP, **_LAUNCH
            )
    *outer, width = values.shape
    return MXFP4(packed.view(*outer, width // 2), scales.view(*outer, width // BLOCK))


def fake_quantize(
    values: Float[Tensor, "*rows d"], rule: ScaleRule = ScaleRule.FLOOR, out: Tensor | None = None
) -> Float[Tensor, "*rows d"]:
    """As `formats.mxfp4.fake_quantize`; ``out`` may be ``values`` itself.

    Raises:
        FormatError: as there.
        UsageError: ``out`` has another shape, dtype or device, or is not contiguous.
    """
    rows = as_blocks(values, (torch.float32, torch.bfloat16)).contiguous()
    target = result(out, tuple(values.shape), values.dtype, values.device)
    if len(rows):
        with on_device(values):
            fake_quantize_kernel[_grid(len(rows))](
                bits(rows), bits(target), len(rows), rule.card.add, STEP=_STEP, **_LAUNCH
            )
    return target


def dequantize(
    quantized: MXFP4, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Float[Tensor, "*rows d"]:
    """As `formats.mxfp4.dequantize`.

    Raises:
        FormatError: as there.
        UsageError: ``out`` has another shape, dtype or device, or is not contiguous.
    """
    check_parts(quantized, dtype)
    packed, scales = (part.contiguous() for part in quantized)
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    target = result(out, shape, dtype, packed.device)
    blocks = scales.numel()
    if blocks:
        with on_device(packed):
            dequantize_kernel[_grid(blocks)](
                packed, scales, bits(target), blocks, STEP=_STEP, **_LAUNCH
            )
    return target


_LAUNCH = {"num_warps": _WARPS, **OPTIONS}


def _grid(blocks: int) -> tuple[int]:
    return (triton.cdiv(blocks, _STEP),)
