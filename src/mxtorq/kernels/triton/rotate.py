# mypy: allow-untyped-defs, allow-incomplete-defs
"""An online rotation and the rounding behind it in one pass: I (x) R, one 32 x 32 matrix.

Every block of 32 features is multiplied by the same matrix and rounded to MXFP4: the activation is
read once, codes and scales are written once, and the rotated activation never reaches memory.
Whatever the dtype of the input, it is rotated and rounded as float32, which is what the emulation
does too. How the 32 products of an output are summed is the caller's choice (`Sums`), since it is
the one thing that can change a bit: a sum next to a rounding cut may fall on its other side.

    ascending   from +0, k = 0 to 31, every product and every sum rounded to float32 (nothing is
                fused): the bits of the same loop in eager torch, on every device
    ieee        float32 fused multiply-adds in an order that the compiler chooses; NVIDIA's matrix
                units cannot do this, AMD's can
    tf32x3      three products on NVIDIA's matrix units that together carry float32 (some units in
                the last place of the sum of magnitudes); AMD has no such units
    bf16        one product on the matrix units: input and matrix are first rounded to bfloat16,
                relative error up to 2^-8 of the sum of magnitudes; for bfloat16 input only the
                matrix loses anything

Where a caller leaves it out, it is tf32x3, on AMD GPUs ieee. Given the float32 sums, codes and
scales are exact: the rounding is that of `formats.mxfp4`.
"""

from enum import StrEnum

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, as_blocks
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.triton.compile import OPTIONS, bits, kernel, on_device, result
from mxtorq.kernels.triton.elements import as_float, bfloat16_bits, emit, float_bits


class Sums(StrEnum):
    """How a kernel sums products in float32; the module's docstring says what is exact."""

    ASCENDING = "ascending"
    IEEE = "ieee"
    TF32X3 = "tf32x3"
    BF16 = "bf16"


_STEP = 64
_WARPS = 4
_FAKE = (torch.float32, torch.bfloat16)


@kernel
def dot(left, right, SUMS: tl.constexpr):
    """left @ right of float32 tiles, summed as ``SUMS`` says (not ``ascending``)."""
    if SUMS == "bf16":
        low = bfloat16_bits(left.to(tl.int32, bitcast=True)).to(tl.bfloat16, bitcast=True)
        high = bfloat16_bits(right.to(tl.int32, bitcast=True)).to(tl.bfloat16, bitcast=True)
        product = tl.dot(low, high)
    else:
        product = tl.dot(left, right, input_precision=SUMS)
    return product


@kernel
def rotate_kernel(
    values,
    matrix,
    out,
    scales,
    blocks,
    add,
    STEP: tl.constexpr,
    SUMS: tl.constexpr,
    FAKE: tl.constexpr,
):
    """STEP blocks a program, times a float32 matrix [32, 32], rounded."""
    start = tl.program_id(0).to(tl.int64) * STEP
    row = tl.arange(0, STEP)
    column = tl.arange(0, 32)
    inside = row < blocks - start
    values += start * 32
    if SUMS == "ascending":
        sums = tl.zeros((STEP, 32), dtype=tl.float32)
        for k in range(32):
            loaded = tl.load(values + row * 32 + k, mask=inside, other=0)
            weight = tl.load(matrix + k * 32 + column)
            sums += as_float(float_bits(loaded))[:, None] * weight[None, :]
    else:
        at = row[:, None] * 32 + column[None, :]
        loaded = tl.load(values + at, mask=inside[:, None], other=0)
        weights = tl.load(matrix + column[:, None] * 32 + column[None, :])
        sums = dot(as_float(float_bits(loaded)), weights, SUMS)
    emit(sums, start + row, inside, out, scales, add, FAKE)


def rotate_quantize(
    values: Float[Tensor, "*rows d"],
    matrix: Float[Tensor, "32 32"],
    rule: ScaleRule = ScaleRule.FLOOR,
    sums: Sums | None = None,
) -> MXFP4:
    """`quantize` of every block of 32 times ``matrix`` (row vectors: x' = x R).

    Args:
        values: float32, bfloat16 or float16.
        matrix: taken in float32.

    Raises:
        FormatError: as `quantize`.
    """
    rows = as_blocks(values).contiguous()
    packed, scales = new_quantized(len(rows), values.device)
    _launch(rows, matrix, packed, scales, rule, sums, fake=False)
    *outer, width = values.shape
    return MXFP4(packed.view(*outer, width // 2), scales.view(*outer, width // BLOCK))


def rotate_fake_quantize(
    values: Float[Tensor, "*rows d"],
    matrix: Float[Tensor, "32 32"],
    rule: ScaleRule = ScaleRule.FLOOR,
    sums: Sums | None = None,
    out: Tensor | None = None,
) -> Float[Tensor, "*rows d"]:
    """What `rotate_quantize` stands for, as float32; or as the dtype of ``out``, float32 or
    bfloat16, in which the values are exact too.

    Raises:
        FormatError: as `quantize`.
        UsageError: ``out`` has another shape, dtype or device, or is not contiguous.
    """
    rows = as_blocks(values).contiguous()
    target = fake_result(values, out)
    _launch(rows, matrix, bits(target), target, rule, sums, fake=True)
    return target


def chosen(sums: Sums | None) -> Sums:
    """``sums``, or what the device type is good at."""
    if sums is None:
        return Sums.IEEE if torch.version.hip else Sums.TF32X3
    return Sums(sums)


def new_quantized(
    blocks: int, device: torch.device
) -> tuple[UInt8[Tensor, "blocks 16"], UInt8[Tensor, " blocks"]]:
    """Room for the codes and the scale bytes of so many blocks."""
    packed = torch.empty(blocks, BLOCK // 2, dtype=torch.uint8, device=device)
    return packed, torch.empty(blocks, dtype=torch.uint8, device=device)


def fake_result(values: Tensor, out: Tensor | None) -> Tensor:
    """``out``, or a float32 tensor of the shape of ``values``.

    Raises:
        UsageError: ``out`` is not such a tensor in float32 or bfloat16.
    """
    dtype = out.dtype if out is not None and out.dtype in _FAKE else torch.float32
    return result(out, tuple(values.shape), dtype, values.device)


def require_square(matrix: Tensor, size: int, like: Tensor) -> Tensor:
    """A matrix [size, size] on the device of ``like``, float32 and contiguous.

    Raises:
        UsageError: it has another shape or is elsewhere.
    """
    if matrix.shape != (size, size) or matrix.device != like.device:
        raise UsageError(
            asked=f"a rotation by a matrix {tuple(matrix.shape)} on {matrix.device}",
            found=f"values on {like.device} that need a matrix [{size}, {size}] there",
            why="each block of 32 values meets the whole matrix on its own device",
            todo=f"pass a matrix [{size}, {size}] on {like.device}",
        )
    return matrix.detach().float().contiguous()


def _launch(
    rows: Tensor,
    matrix: Tensor,
    out: Tensor,
    scales: Tensor,
    rule: ScaleRule,
    sums: Sums | None,
    *,
    fake: bool,
) -> None:
    weights = require_square(matrix, BLOCK, rows)
    blocks = len(rows)
    if not blocks:
        return
    with on_device(rows):
        rotate_kernel[(triton.cdiv(blocks, _STEP),)](
            bits(rows),
            weights,
            out,
            scales,
            blocks,
            rule.card.add,
            STEP=_STEP,
            SUMS=chosen(sums).value,
            FAKE=fake,
            num_warps=_WARPS,
            **OPTIONS,
        )
