"""What `gpu.py` measures: each kernel, the eager work of the same result, and their agreement.

A case is made just before it is measured and forgotten afterwards, so that one tensor of each kind
is on the device at a time. Kernels are imported where they are used: a machine without Triton can
still read this file.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxtorq.formats import e2m1, mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import block_scales
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.torq.inter_block import GivensChain, equalize

BLOCKS = (128, 448, 864)
WEIGHTS = ((4096, 4096), (28672, 4096), (4096, 14336))
TOKENS = (1, 8, 16, 64, 512, 4096)
GROUP_ROWS = (4096, 28672, 151936)
DTYPES = (torch.float32, torch.bfloat16)
RULE = ScaleRule.EVEN

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel, the eager work of the same result, and what may be said about their bits."""

    name: str
    kernel: Call
    peer: Call
    check: Callable[[Any, Any], str]
    """Empty if results agree as promised, or what differs; never timed."""
    gbytes: float = 0.0
    """What has to be read and written."""
    tflop: float = 0.0
    note: Callable[[Any, Any], str] = lambda mine, theirs: "equal bits"


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the library without its fast backends, where it has any."""
    choice = "backend" in inspect.signature(function).parameters
    return partial(function, backend="eager") if choice else function


def parts(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


def equal(mine: Any, theirs: Any) -> str:
    """Which part of two results differs in bits (NaN is NaN)."""
    for index, (left, right) in enumerate(zip(parts(mine), parts(theirs), strict=True)):
        if left.dtype != right.dtype or left.shape != right.shape:
            return f"part {index}: {left.dtype} {tuple(left.shape)} is no {right.dtype}"
        same = (left == right) | ((left != left) & (right != right))
        if not bool(same.all()):
            return f"part {index}: {int((~same).sum())} of {same.numel()} elements differ"
    return ""


def no_promise(mine: Any, theirs: Any) -> str:
    return ""


def differing(exact: MXFP4) -> Callable[[Any, Any], str]:
    """How many bytes of codes differ from those of the exact sums, for the kernel and for eager."""

    def note(mine: MXFP4, theirs: MXFP4) -> str:
        shares = [(side.packed != exact.packed).double().mean().item() for side in (mine, theirs)]
        return f"{shares[0]:.1e} of bytes off exact (eager {shares[1]:.1e})"

    return note


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def moved(*tensors: Any) -> float:
    """Gigabytes of tensors."""
    each = (part for tensor in tensors for part in parts(tensor))
    return sum(part.numel() * part.element_size() for part in each) / 1e9


def conversions(shape: list[int], device: torch.device) -> Iterator[Case]:
    """quantize, fake_quantize and dequantize."""
    from mxtorq.kernels.triton import mxfp4 as fast

    normal = torch.randn(shape, device=device)
    normal.view(-1)[::100_003] = torch.inf  # some blocks are not numbers
    for dtype in DTYPES:
        values = normal.to(dtype)
        stored = fast.quantize(values, RULE)
        room = torch.empty_like(values)
        pairs: list[tuple[str, Call, Call, float]] = [
            (
                "quantize",
                partial(fast.quantize, values, RULE),
                partial(eager(mxfp4.quantize), values, RULE),
                moved(values, stored),
            ),
            (
                "fake_quantize",
                partial(fast.fake_quantize, values, RULE, room),
                partial(eager(mxfp4.fake_quantize), values, RULE),
                moved(values, values),
            ),
            (
                "dequantize",
                partial(fast.dequantize, stored, dtype, room),
                partial(eager(mxfp4.dequantize), stored, dtype),
                moved(values, stored),
            ),
        ]
        for name, kernel, peer, gbytes in pairs:
            label = f"{name} {name_of(dtype)}"
            yield Case(name=label, kernel=kernel, peer=peer, check=equal, gbytes=gbytes)


def ascending(blocks: Tensor, matrix: Tensor) -> Tensor:
    """Blocks times a matrix, products and sums rounded one by one."""
    sums = torch.zeros_like(blocks)
    for k in range(BLOCK):
        sums = sums + blocks[..., k : k + 1] * matrix[k]
    return sums


def rotations(shape: list[int], device: torch.device) -> Iterator[Case]:
    """One 32 x 32 matrix and rounding."""
    from mxtorq.kernels.triton.rotate import Sums, rotate_quantize

    quantize = eager(mxfp4.quantize)
    wide = torch.linalg.qr(torch.randn(BLOCK, BLOCK, device=device, dtype=torch.float64))[0]
    matrix = wide.float()
    for dtype in DTYPES:
        values = torch.randn(shape, device=device).to(dtype)
        blocks = values.view(-1, BLOCK)

        def rotated(product: Callable[[Tensor], Tensor], rows: Tensor) -> MXFP4:
            return quantize(product(rows).view(shape).float(), RULE)  # type: ignore[no-any-return]

        exact = rotated(lambda rows: rows.double() @ wide, blocks)
        for sums in Sums:
            fixed = sums is Sums.ASCENDING
            product = partial(ascending, matrix=matrix) if fixed else partial(times, matrix=matrix)
            yield Case(
                name=f"rotate 32x32 and quantize {name_of(dtype)}, {sums}",
                kernel=partial(rotate_quantize, values, matrix, RULE, sums),
                peer=partial(lambda act, rows: rotated(act, rows.float()), product, blocks),
                check=equal if fixed else no_promise,
                note=Case.note if fixed else differing(exact),
                gbytes=moved(values, exact),
                tflop=2e-12 * values.numel() * BLOCK,
            )


def times(blocks: Tensor, matrix: Tensor) -> Tensor:
    return blocks @ matrix


def two_levels(tokens: int, device: torch.device) -> Iterator[Case]:
    """TORQ's pair and rounding, R_inter as a chain and dense."""
    from mxtorq.kernels.triton.chain import prepare
    from mxtorq.kernels.triton.rotate import Sums
    from mxtorq.kernels.triton.two_level import two_level_quantize

    quantize = eager(mxfp4.quantize)
    intra = torch.linalg.qr(torch.randn(BLOCK, BLOCK, device=device, dtype=torch.float64))[0]
    for blocks in BLOCKS:
        root = torch.randn(blocks, 2 * blocks, dtype=torch.float64)
        root *= torch.logspace(0, 1, blocks, dtype=torch.float64)[:, None]
        chain = equalize(root @ root.T)
        ready = prepare(chain.first, chain.second, chain.cos, chain.sin, blocks, device)
        inter = chain.matrix(blocks).float().to(device)
        values = torch.randn(tokens, blocks * BLOCK, device=device).bfloat16()

        def rotated(
            way: GivensChain | Tensor, matrix: Tensor | None, rows: Tensor, dtype: torch.dtype
        ) -> MXFP4:
            x = rows.to(dtype).unflatten(-1, (-1, BLOCK))
            x = way.apply(x) if isinstance(way, GivensChain) else way.to(dtype).T @ x
            x = x if matrix is None else x @ matrix.to(dtype)
            return quantize(x.flatten(-2).float(), RULE)  # type: ignore[no-any-return]

        flop = 2e-12 * values.numel() * BLOCK
        label = f"TORQ pair, B={blocks}, {tokens} tokens bfloat16"
        size = moved(values) * (1 + (0.5 + 1 / BLOCK) / 2)
        yield Case(
            name=f"{label}: chain alone",
            kernel=partial(two_level_quantize, values, ready, None, RULE),
            peer=partial(rotated, chain, None, values, torch.float32),
            check=equal,
            gbytes=size,
            tflop=6e-12 * len(chain) * BLOCK * tokens,
        )
        exact = rotated(inter.double(), intra, values, torch.float64)
        ways: list[tuple[bool, Sums]] = [
            (dense, sums) for dense in (False, True) for sums in (Sums.TF32X3, Sums.BF16)
        ]
        for dense, sums in ways:
            way = inter if dense else ready
            yield Case(
                name=f"{label}: {'dense' if dense else 'chain'} and R_intra, {sums}",
                kernel=partial(two_level_quantize, values, way, intra, RULE, sums),
                peer=partial(rotated, inter, intra, values, torch.float32),
                check=no_promise,
                note=differing(exact),
                gbytes=size,
                tflop=flop * (1 + blocks / BLOCK if dense else 1),
            )


def groups(device: torch.device) -> Iterator[Case]:
    """GPTQ: one group of 32 columns."""
    from mxtorq.kernels.triton.gptq import round_group_

    follow = torch.randn(BLOCK, BLOCK, device=device) / 10

    def kernel(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        free, errors = columns.clone(), torch.empty_like(columns)
        scales = torch.empty_like(columns[0])
        round_group_(free, follow, errors, scales, RULE)
        return free, errors, scales

    def columnwise(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        free, errors = columns.clone(), torch.empty_like(columns)
        scales = block_scales(free.T.contiguous(), RULE)
        for j in range(BLOCK):
            multiple = free[j] / scales
            errors[j] = free[j] - e2m1.nearest(multiple) * scales
            free[j] = multiple
            free[j + 1 :] -= follow[j, j + 1 :, None] * errors[j]
        return free, errors, scales

    for rows in GROUP_ROWS:
        columns = torch.randn(BLOCK, rows, device=device)
        yield Case(
            name=f"GPTQ group of 32 columns, {rows} rows",
            kernel=partial(kernel, columns),
            peer=partial(columnwise, columns),
            check=equal,
            gbytes=3 * moved(columns),
        )


def products(device: torch.device) -> Iterator[Case]:
    """W4A4 products against torch's in BF16."""
    from mxtorq.kernels.triton.matmul import matmul

    quantize, dequantize = eager(mxfp4.quantize), eager(mxfp4.dequantize)
    for rows, depth in WEIGHTS:
        weight = quantize(torch.randn(rows, depth, device=device), RULE)
        wide = dequantize(weight, torch.bfloat16)
        for tokens in TOKENS:
            x = quantize(torch.randn(tokens, depth, device=device), RULE)
            plain = dequantize(x, torch.bfloat16)

            def error(mine: Tensor, theirs: Tensor, x: Tensor = plain, w: Tensor = wide) -> float:
                """In units of the bound: rounding to bfloat16, and K sums in float32."""
                some = torch.arange(0, len(w), max(1, len(w) // 256), device=device)
                left, right = x[:256].double(), w[some].double()
                exact, size = left @ right.T, left.abs() @ right.abs().T
                bound = exact.abs() * 2.0**-8 + 1.01 * w.shape[1] * 2.0**-23 * size
                found = mine[:256, some].double()
                return float(((found - exact).abs() / bound).max())

            def check(mine: Tensor, theirs: Tensor, of: Callable[..., float] = error) -> str:
                unit = of(mine, theirs)
                return "" if unit <= 1 else f"an error of {unit:.2g} bounds"

            def note(mine: Tensor, theirs: Tensor, of: Callable[..., float] = error) -> str:
                return f"error at most {of(mine, theirs):.2f} of its bound"

            yield Case(
                name=f"W4A4 product, {tokens} x {rows} x {depth} to bfloat16",
                kernel=partial(matmul, x, weight, None, torch.bfloat16),
                peer=partial(torch.nn.functional.linear, plain, wide),
                check=check,
                note=note,
                gbytes=moved(x, weight) + 2e-9 * tokens * rows,
                tflop=2e-12 * tokens * rows * depth,
            )
