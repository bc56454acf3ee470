# mypy: allow-untyped-defs, allow-incomplete-defs
"""W4A4 products: packed MXFP4 weights times packed MXFP4 activations, float32 sums.

`tl.dot_scaled` takes codes and scale bytes of both sides as they are stored. Blackwell (sm_100,
sm_103, sm_120) has it in its matrix units; for sm_90 and sm_80 Triton unpacks both sides to
bfloat16, in which their values are exact, and uses the BF16 units. (For AMD's MI300 Triton 3.9
compiles it and 3.6 does not.) The weight is the left operand and the tokens are the right one, so a
few tokens take a narrow tile instead of a padded one: below 17 tokens the product is bound by
reading the 4-bit weight once, and K is split over programs where the weight has too few rows to
occupy the device.

Products of two elements and the sum of a block of 32 are exact in float32; what is rounded is the
sum over blocks, in an order that the hardware and the tiles choose: |error| <= K 2^-23 sum |x w| is
safe on units that truncate. Where all partial sums are representable the result is exact. NaN
blocks (scale byte 255) give NaN. Scales at the ends of E8M0, where a value leaves the normal range
of bfloat16, are left to the unit: byte 0 may be read as 0 on the emulated path.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mxtorq.errors import FormatError, UsageError
from mxtorq.formats.mxfp4 import MXFP4, check_parts
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.triton.compile import OPTIONS, bits, kernel, on_device, result
from mxtorq.kernels.triton.elements import as_bits, bfloat16_bits

ROWS = 128
"""Rows of the weight a tile."""
INNER = 128
"""Elements of K a step."""
FEW = 16
"""Tokens up to which K may be split."""
_WIDEST = 128
_GROUP = 8  # tiles of tokens that share a tile of the weight while it is in the cache


@kernel
def matmul_kernel(
    weight,
    weight_scales,
    tokens,
    token_scales,
    bias,
    out,
    rows,
    count,
    halves,
    blocks,
    steps,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of out[token, row], over ``steps`` steps of K; a split has a part of out each.

    ``halves`` and ``blocks`` are the bytes of codes and of scales of a row, apart so that Triton
    sees how they are aligned; ``WHOLE`` says that INNER divides K.
    """
    tiles = tl.cdiv(count, COUNT)
    across = GROUP * tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // across
    height = tl.minimum(tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % across
    row = (within // height) * ROWS + tl.arange(0, ROWS)
    token = (group * GROUP + within % height) * COUNT + tl.arange(0, COUNT)
    first = tl.program_id(1) * steps
    half = tl.arange(0, INNER // 2)
    block = tl.arange(0, INNER // 32)
    # Rows and tokens that are not there repeat others; they are never stored.
    row64 = (row % rows).to(tl.int64)
    token64 = (token % count).to(tl.int64)
    weight += first * (INNER // 2)
    tokens += first * (INNER // 2)
    weight_scales += first * (INNER // 32)
    token_scales += first * (INNER // 32)
    w = weight + row64[:, None] * halves + half[None, :]
    x = tokens + token64[None, :] * halves + half[:, None]
    w_scale = weight_scales + row64[:, None] * blocks + block[None, :]
    x_scale = token_scales + token64[:, None] * blocks + block[None, :]
    sums = tl.zeros((ROWS, COUNT), dtype=tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(halves, INNER // 2))):
        if WHOLE:
            left = tl.load(w)
            left_scale = tl.load(w_scale)
            right = tl.load(x)
            right_scale = tl.load(x_scale)
        else:
            here = half < halves - step * (INNER // 2)
            there = (block < blocks - step * (INNER // 32))[None, :]
            left = tl.load(w, mask=here[None, :], other=0)
            left_scale = tl.load(w_scale, mask=there, other=127)
            right = tl.load(x, mask=here[:, None], other=0)
            right_scale = tl.load(x_scale, mask=there, other=127)
        sums = tl.dot_scaled(left, left_scale, "e2m1", right, right_scale, "e2m1", sums)
        w += INNER // 2
        x += INNER // 2
        w_scale += INNER // 32
        x_scale += INNER // 32
    if BIAS:
        sums += tl.load(bias + row, mask=row < rows, other=0.0)[:, None]
    inside = (row < rows)[:, None] & (token < count)[None, :]
    part = tl.program_id(1).to(tl.int64) * count
    at = (part + token.to(tl.int64))[None, :] * rows + row[:, None]
    if out.dtype.element_ty == tl.int16:
        tl.store(out + at, bfloat16_bits(as_bits(sums)), mask=inside)
    else:
        tl.store(out + at, sums, mask=inside)


def matmul(
    activations: MXFP4,
    weight: MXFP4,
    bias: Float[Tensor, " d_out"] | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    splits: int | None = None,
) -> Float[Tensor, "*tokens d_out"]:
    """x W^T + b of two MXFP4 tensors [*tokens, d] and [d_out, d].

    Args:
        bias: added in float32.
        dtype: float32 or bfloat16 (the float32 sum, rounded to nearest even).
        splits: parts of K that are summed apart; chosen by tokens and device unless given.

    Raises:
        FormatError: a side is not whole, or their widths differ.
        UsageError: another dtype; ``out`` cannot take the result.
    """
    for part in (weight, activations):
        check_parts(part, torch.float32)
    packed, scales = (part.contiguous() for part in weight)
    token_packed, token_scales = (part.contiguous() for part in activations)
    if packed.dim() != 2 or token_packed.shape[-1] != packed.shape[-1]:
        raise FormatError(
            asked="x W^T of two MXFP4 tensors",
            found=f"packed shapes {tuple(token_packed.shape)} and {tuple(packed.shape)}",
            why="a weight is a matrix, and both sides are summed over the same features",
            todo="pass activations [*tokens, d] and a weight [d_out, d]",
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(
            asked=f"an MXFP4 product as {dtype}",
            found="float32 sums",
            why="they are stored as they are, or rounded once to bfloat16",
            todo="ask for float32 or bfloat16",
        )
    rows, depth = packed.shape[0], packed.shape[1] * 2
    target = result(out, (*token_packed.shape[:-1], rows), dtype, packed.device)
    count = token_packed.numel() * 2 // depth
    if not target.numel():
        return target
    wide = min(_WIDEST, max(FEW, triton.next_power_of_2(count)))
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(count, wide)
    parts = _splits(count, tiles, depth, packed.device) if splits is None else splits
    steps = triton.cdiv(triton.cdiv(depth, INNER), parts)
    parts = triton.cdiv(triton.cdiv(depth, INNER), steps)
    apart = parts > 1
    room = torch.empty(parts, count, rows, device=packed.device) if apart else _as_stored(target)
    added = None if bias is None else bias.detach().float().contiguous()
    with on_device(packed):
        matmul_kernel[(tiles, parts)](
            *(packed, scales, token_packed, token_scales),
            *(packed if added is None or apart else added, room),
            *(rows, count, depth // 2, depth // BLOCK, steps),
            ROWS=ROWS,
            COUNT=wide,
            INNER=INNER,
            GROUP=_GROUP,
            BIAS=added is not None and not apart,
            WHOLE=depth % INNER == 0,
            num_warps=4 if wide <= 64 else 8,
            **OPTIONS,
        )
    if apart:
        sums = room.sum(0)
        target.view(count, rows).copy_(sums if added is None else sums + added)
    return target


def _as_stored(target: Tensor) -> Tensor:
    """A bfloat16 result as the integers that the kernel stores; float32 as it is."""
    return bits(target) if target.dtype == torch.bfloat16 else target


def _splits(count: int, tiles: int, depth: int, device: torch.device) -> int:
    """Parts of K that give each multiprocessor two programs, for a few tokens; else 1."""
    if count > FEW or device.type != "cuda":
        return 1
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // tiles, depth // (4 * INNER)))
