# mypy: allow-untyped-defs, allow-incomplete-defs
"""TORQ's pair online: z = R_inter^T X R_intra for each token X [blocks, 32], then rounding.

R_inter is a chain of Givens rotations between whole blocks. Two ways to apply it:

    chain   rotation by rotation, 6 operations an element instead of 2 B. A token's blocks wait in
            float32 scratch that a program owns and reuses, small enough to stay in the second-level
            cache; a block's first use reads the activation itself. Each rotation is a, b -> c a + s
            b, c b - s a with every product and sum rounded to float32: the bits of
            `GivensChain.apply` in eager float32.
    dense   the B x B product on the matrix units, which read the activation B / 32 times (from the
            cache); summed as `Sums` says, not ``ascending``.

Which is faster depends on B and on the device, and is measured by the benchmark. R_intra follows
in registers, then rounding, so that memory sees the activation once and codes and scales once. The
32 products of R_intra are summed as `Sums` says; with ``ascending`` the chain's result has the same
bits everywhere. Without R_intra the chain is exact in this sense under any `Sums`.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, as_blocks
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.triton.chain import Chain
from mxtorq.kernels.triton.compile import OPTIONS, bits, kernel, on_device
from mxtorq.kernels.triton.elements import as_float, emit, float_bits
from mxtorq.kernels.triton.rotate import (
    Sums,
    chosen,
    dot,
    fake_result,
    new_quantized,
    require_square,
)

SHORT = 128
"""Blocks up to which a program of the chain takes 4 tokens at a time; above, it takes one."""
_TILE = 16  # blocks of a token that meet R_intra at once
_SCRATCH = 24 << 20  # bytes of all programs: half of the second-level cache of a data-centre GPU
_PROGRAMS = 8  # a multiprocessor, where the scratch allows it


@kernel
def _read(values, scratch, fresh, at, scratch_at, inside):
    """A tile of a block: of the activation where it is fresh, else what the chain left of it."""
    first = tl.load(values + at, mask=inside & fresh, other=0)
    later = tl.load(scratch + scratch_at, mask=inside & (~fresh), other=0.0)
    return tl.where(fresh, as_float(float_bits(first)), later)


@kernel
def chain_kernel(
    values,
    planes,
    angles,
    touched,
    intra,
    scratch,
    out,
    scales,
    tokens,
    steps,
    blocks,
    add,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    INTRA: tl.constexpr,
    SUMS: tl.constexpr,
    FAKE: tl.constexpr,
):
    """All rotations of TOKENS tokens at a time, then R_intra and rounding, by TILE blocks."""
    width = blocks * 32
    lane = tl.arange(0, 32)
    some = tl.arange(0, TOKENS)
    rows = tl.arange(0, TOKENS * TILE)
    token = rows // TILE
    scratch += tl.program_id(0).to(tl.int64) * TOKENS * width
    own = some[:, None] * width + lane[None, :]  # in the scratch
    for start in range(tl.program_id(0) * TOKENS, tokens, tl.num_programs(0) * TOKENS):
        given = (start + some).to(tl.int64)[:, None] * width + lane[None, :]  # in the activation
        present = (some < tokens - start)[:, None]
        for step in range(steps):
            i = tl.load(planes + 2 * step)
            j = tl.load(planes + 2 * step + 1)
            cos = tl.load(angles + 2 * step)
            sin = tl.load(angles + 2 * step + 1)
            to_i = (i >> 1) * 32
            to_j = (j >> 1) * 32
            new_i = (some < (i & 1) * TOKENS)[:, None]  # all, or none
            new_j = (some < (j & 1) * TOKENS)[:, None]
            a = _read(values, scratch, new_i, given + to_i, own + to_i, present)
            b = _read(values, scratch, new_j, given + to_j, own + to_j, present)
            tl.store(scratch + own + to_i, cos * a + sin * b, mask=present)
            tl.store(scratch + own + to_j, cos * b - sin * a, mask=present)
            tl.debug_barrier()  # the next rotation may read what another thread wrote
        for first in range(0, blocks, TILE):
            block = first + rows % TILE
            inside = (token < tokens - start) & (block < blocks)
            fresh = tl.load(touched + block, mask=block < blocks, other=0) == 0
            row = (start + token).to(tl.int64) * blocks + block
            kept = token * width + block * 32
            if INTRA and SUMS == "ascending":
                tile = tl.zeros((TOKENS * TILE, 32), dtype=tl.float32)
                for k in range(32):
                    column = _read(values, scratch, fresh, row * 32 + k, kept + k, inside)
                    tile += column[:, None] * tl.load(intra + k * 32 + lane)[None, :]
            else:
                at = row[:, None] * 32 + lane[None, :]
                where = kept[:, None] + lane[None, :]
                tile = _read(values, scratch, fresh[:, None], at, where, inside[:, None])
                if INTRA:
                    matrix = tl.load(intra + lane[:, None] * 32 + lane[None, :])
                    tile = dot(tile, matrix, SUMS)
            emit(tile, row, inside, out, scales, add, FAKE)
        tl.debug_barrier()  # the next tokens take over the scratch


@kernel
def dense_kernel(
    values,
    inter,
    intra,
    out,
    scales,
    tokens,
    blocks,
    add,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    INTRA: tl.constexpr,
    SUMS: tl.constexpr,
    FAKE: tl.constexpr,
):
    """ROWS output blocks of TOKENS tokens: R_inter^T X, then R_intra and rounding."""
    width = blocks * 32
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * TOKENS
    base = values + start.to(tl.int64) * width
    column = tl.arange(0, TOKENS * 32)
    present = column // 32 < tokens - start
    sums = tl.zeros((ROWS, TOKENS * 32), dtype=tl.float32)
    for first in range(0, blocks, INNER):
        k = first + tl.arange(0, INNER)
        mask = (k < blocks)[None, :] & (block < blocks)[:, None]
        weight = tl.load(inter + k[None, :] * blocks + block[:, None], mask=mask, other=0.0)
        at = k[:, None] * 32 + ((column // 32) * width + column % 32)[None, :]
        mask = (k < blocks)[:, None] & present[None, :]
        sums += dot(weight, as_float(float_bits(tl.load(base + at, mask=mask, other=0))), SUMS)
    tile = tl.reshape(sums, (ROWS * TOKENS, 32))
    lane = tl.arange(0, 32)
    if INTRA:
        tile = dot(tile, tl.load(intra + lane[:, None] * 32 + lane[None, :]), SUMS)
    rows = tl.arange(0, ROWS * TOKENS)
    token = start + rows % TOKENS
    target = tl.program_id(0) * ROWS + rows // TOKENS
    inside = (token < tokens) & (target < blocks)
    emit(tile, token.to(tl.int64) * blocks + target, inside, out, scales, add, FAKE)


def two_level_quantize(
    values: Float[Tensor, "*tokens d"],
    inter: Chain | Float[Tensor, "blocks blocks"],
    intra: Float[Tensor, "32 32"] | None = None,
    rule: ScaleRule = ScaleRule.FLOOR,
    sums: Sums | None = None,
) -> MXFP4:
    """`quantize` of R_inter^T X R_intra; R_inter as a `Chain`, or dense, which is the caller's
    choice between the two ways.

    Raises:
        FormatError: as `quantize`.
        UsageError: R_inter is of another width or device, or dense with ascending sums.
    """
    packed, scales = new_quantized(values.numel() // BLOCK, values.device)
    _launch(values, inter, intra, packed, scales, rule, sums, fake=False)
    *outer, width = values.shape
    return MXFP4(packed.view(*outer, width // 2), scales.view(*outer, width // BLOCK))


def two_level_fake_quantize(
    values: Float[Tensor, "*tokens d"],
    inter: Chain | Float[Tensor, "blocks blocks"],
    intra: Float[Tensor, "32 32"] | None = None,
    rule: ScaleRule = ScaleRule.FLOOR,
    sums: Sums | None = None,
    out: Tensor | None = None,
) -> Float[Tensor, "*tokens d"]:
    """What `two_level_quantize` stands for, as float32 or the dtype of ``out``, as in `rotate`.

    Raises:
        FormatError, UsageError: as `two_level_quantize`, and where ``out`` cannot take the result.
    """
    target = fake_result(values, out)
    _launch(values, inter, intra, bits(target), target, rule, sums, fake=True)
    return target


def _launch(
    values: Tensor,
    inter: Chain | Tensor,
    intra: Tensor | None,
    out: Tensor,
    scales: Tensor,
    rule: ScaleRule,
    sums: Sums | None,
    *,
    fake: bool,
) -> None:
    rows = as_blocks(values).contiguous()
    blocks = values.shape[-1] // BLOCK
    tokens = len(rows) // blocks
    weights = rows if intra is None else require_square(intra, BLOCK, rows)
    options = {"INTRA": intra is not None, "SUMS": chosen(sums).value, "FAKE": fake, **OPTIONS}
    if not isinstance(inter, Chain):
        if sums is Sums.ASCENDING:
            raise UsageError(
                asked="ascending sums with a dense R_inter",
                found="a product whose order of summation is the compiler's",
                why="the dense way is for the matrix units",
                todo="pass the rotations as a chain (`chain.prepare`), or another sums",
            )
        inter = require_square(inter, blocks, rows)
    elif len(inter.touched) != blocks or inter.touched.device != values.device:
        raise UsageError(
            asked=f"a rotation of {blocks} blocks on {values.device}",
            found=f"a chain over {len(inter.touched)} blocks on {inter.touched.device}",
            why="the kernel follows it block by block",
            todo="prepare the chain for this width and device",
        )
    if not tokens:
        return
    with on_device(values):
        if isinstance(inter, Chain):
            each = 4 if blocks <= SHORT else 1
            programs = min(triton.cdiv(tokens, each), _programs(values.device, each * blocks))
            room = torch.empty(programs * each * blocks * BLOCK, device=values.device)
            chain_kernel[(programs,)](
                *(bits(rows), inter.planes, inter.angles, inter.touched, weights, room),
                *(out, scales, tokens, len(inter.planes), blocks, rule.card.add),
                **{"TOKENS": each, "TILE": _TILE, "num_warps": 1, "num_stages": 1, **options},
            )
        else:
            grid = (triton.cdiv(blocks, 64), triton.cdiv(tokens, 4))
            dense_kernel[grid](
                *(bits(rows), inter, weights, out, scales, tokens, blocks, rule.card.add),
                **{"TOKENS": 4, "ROWS": 64, "INNER": 32, "num_warps": 4, **options},
            )


def _programs(device: torch.device, blocks: int) -> int:
    """Programs that share the scratch; every one of them holds so many blocks."""
    if device.type != "cuda":
        return 2
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(_PROGRAMS * processors, _SCRATCH // (blocks * BLOCK * 4)))
