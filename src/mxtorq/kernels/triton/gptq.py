# mypy: allow-untyped-defs, allow-incomplete-defs
"""GPTQ's inner block: one group of 32 columns, rounded column by column, all rows side by side.

The serial part of GPTQ (see `rounding.gptq`) is a loop over columns in which every row does the
same on its own. Eager torch pays several launches a column; here a group costs one. A program keeps
32 columns of some rows in registers. For each column j, in the order of rounding,

    multiple_j = w_j / scale           error_j = w_j - nearest(multiple_j) * scale
    w_k = w_k - follow_jk * error_j    for each later column k of the group

and every quotient, product and difference is rounded to float32 on its own, so the bits are those
of the same lines in eager torch. What the group's errors do to later columns is a matrix product
and stays with the caller.

Powers of two from a scale rule are divided by through the product with their exact inverse, which
rounds the same real number; scales that are given may be any, and are divided by (IEEE).
"""

import triton
import triton.language as tl
from jaxtyping import Float32
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.kernels.triton.compile import OPTIONS, kernel, on_device
from mxtorq.kernels.triton.elements import (
    as_bits,
    as_float,
    inverse_power,
    nearest,
    power,
    scale_bytes,
)

_ROWS = 32  # a program, on one warp: few rows a program, since a weight has few thousand of them


@kernel
def group_kernel(
    columns,
    follow,
    errors,
    scales,
    rows,
    follow_stride,
    add,
    ROWS: tl.constexpr,
    DYNAMIC: tl.constexpr,
):
    """32 columns of ROWS rows; the columns become multiples of their scales."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    place = tl.arange(0, 32)
    at = place[:, None] * rows + row[None, :]
    free = tl.load(columns + at, mask=inside[None, :], other=0.0)
    tl.debug_barrier()  # every element is read before one is overwritten
    if DYNAMIC:
        byte = scale_bytes(tl.max(as_bits(free) & 0x7FFFFFFF, axis=0), add)
        scale = as_float(power(byte))
        inverse = tl.where(byte == 255, scale, as_float(inverse_power(byte)))  # NaN stays NaN
        tl.store(scales + row, scale, mask=inside)
    else:
        scale = tl.load(scales + row, mask=inside, other=1.0)
    for j in range(32):  # unrolled it takes a third of the time and half a minute to compile
        # The sum has one term, as integers: a float sum would lose the sign of -0.
        column = as_float(tl.sum(tl.where((place == j)[:, None], as_bits(free), 0), axis=0))
        multiple = column * inverse if DYNAMIC else tl.div_rn(column, scale)
        error = column - nearest(as_bits(multiple)) * scale
        tl.store(columns + j * rows + row, multiple, mask=inside)
        tl.store(errors + j * rows + row, error, mask=inside)
        weight = tl.load(follow + j * follow_stride + place)
        moved = free - weight[:, None] * error[None, :]
        free = tl.where((place > j)[:, None], moved, free)


def round_group_(
    columns: Float32[Tensor, "32 rows"],
    follow: Float32[Tensor, "32 32"],
    errors: Float32[Tensor, "32 rows"],
    scales: Float32[Tensor, " rows"],
    rule: ScaleRule | None = None,
) -> None:
    """Round one group in place.

    Args:
        columns: the weight's columns as rows, in the order of rounding; each becomes its multiple
            of the scales, unrounded, as `e2m1.encode` wants it.
        follow: how much of column j's error is taken from column k, at [j, k]; only k > j is used.
            May be a part of a larger matrix.
        errors: what rounding took off each column is written here.
        scales: read where ``rule`` is None; else the scales of the group, by that rule, are written
            here.

    Raises:
        UsageError: a tensor is not contiguous (rows of ``follow`` may be apart), or elsewhere.
    """
    rows = columns.shape[1]
    whole = all(tensor.is_contiguous() for tensor in (columns, errors, scales))
    parts = (columns, follow, errors, scales)
    if not whole or follow.stride(1) != 1 or len({tensor.device for tensor in parts}) > 1:
        raise UsageError(
            asked="GPTQ of one group of columns in place",
            found=f"strides {[tensor.stride() for tensor in parts]} on "
            f"{[str(tensor.device) for tensor in parts]}",
            why="the kernel reads columns, errors and scales as contiguous rows on one device",
            todo="pass contiguous tensors (slices of the first axis are)",
        )
    if not rows:
        return
    with on_device(columns):
        group_kernel[(triton.cdiv(rows, _ROWS),)](
            columns,
            follow,
            errors,
            scales,
            rows,
            follow.stride(0),
            0 if rule is None else rule.card.add,
            ROWS=_ROWS,
            DYNAMIC=rule is not None,
            num_warps=1,
            num_stages=1,
            **OPTIONS,
        )
