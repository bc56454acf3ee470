"""How near to the machine's own limits a CPU gets: copying memory, and multiplying matrices.

    python benchmarks/limits.py --shape 4096 4096 --threads 1 --rounds 7 --json out.json

Quantize, fake-quantize and dequantize take turns with a copy of the same tensor, all into memory
that exists; what is compared is bytes read and written a second. Rotating each block of 32 by a
matrix and rounding it takes turns with a large FP32 matrix product; what is compared is
multiply-adds a second, the rounding not counted. "of the limit" is the median over the turns.

A copy reads what it overwrites, unless it is told not to; a kernel that writes past the caches can
be faster than the copy that it is held against.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mxtorq.formats.spec import BLOCK
from mxtorq.kernels import dispatch
from mxtorq.kernels.dispatch import Backend, pick
from record import add_outputs, heading, provenance, table, write

GEMM_SIDE = 2048
PACKAGES = ("mxtorq", "torch", "numpy", "numba")


@dataclass(frozen=True)
class Pair:
    """A call and the limit that it is held against."""

    operation: str
    dtype: str
    backend: str
    call: Callable[[], Any]
    work: float
    """Bytes, or floating-point operations."""
    limit: Callable[[], Any]
    limit_work: float
    limit_name: str


def backends() -> list[Backend]:
    """Eager, and what is fastest on this CPU if that is something else."""
    return sorted({Backend.EAGER, pick(Backend.AUTO, torch.device("cpu"))})


def pairs(shape: list[int], seed: int) -> Iterator[Pair]:
    """All of them."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=draw)
    left, right = torch.randn(2, GEMM_SIDE, GEMM_SIDE, generator=draw)
    product = torch.zeros(GEMM_SIDE, GEMM_SIDE)
    gemm, gemm_work = partial(torch.mm, left, right, out=product), 2.0 * GEMM_SIDE**3
    packed_bytes = normal.numel() * (1 / 2 + 1 / BLOCK)
    for dtype in (torch.float32, torch.bfloat16):
        values, name = normal.to(dtype), str(dtype).removeprefix("torch.")
        out = torch.zeros_like(values)
        plain = float(values.numel() * values.element_size())
        copy = partial(out.copy_, values)
        packed = dispatch.quantize(values)
        for backend in backends():
            work: dict[str, tuple[Callable[[], Any], float]] = {
                "quantize": (partial(dispatch.quantize, values), plain + packed_bytes),
                "fake_quantize": (partial(dispatch.fake_quantize, values, out=out), 2 * plain),
                "dequantize": (
                    partial(dispatch.dequantize, packed, dtype, out=out),
                    plain + packed_bytes,
                ),
            }
            for operation, (call, moved) in work.items():
                ready: Any = partial(call, backend=backend)  # type: ignore[call-arg]
                yield Pair(operation, name, backend, ready, moved, copy, 2 * plain, "copy")
    rotations = torch.linalg.qr(torch.randn(shape[1] // BLOCK, BLOCK, BLOCK, generator=draw))[0]
    out = torch.zeros_like(normal)
    flops = 2.0 * normal.numel() * BLOCK
    for matrices, what in ((rotations[:1], "one matrix"), (rotations, "a matrix a block")):
        for backend in backends():
            given: dict[str, Any] = {"values": normal, "matrices": matrices, "backend": backend}
            fake = partial(dispatch.rotate_fake_quantize, out=out, **given)
            codes = partial(dispatch.rotate_quantize, **given)
            for operation, call in (("rotate + fake_quantize", fake), ("rotate + quantize", codes)):
                name = f"float32, {what}"
                yield Pair(operation, name, backend, call, flops, gemm, gemm_work, "FP32 GEMM")


def clocked(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a call, the release of its result included."""
    gc.collect()
    started = clock()
    call()
    return clock() - started


def measure(
    shape: list[int], rounds: int, seed: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """A row for each operation, dtype and backend.

    Keys: operation, dtype, backend, milliseconds, rate (GB/s or GFLOP/s), limit (its name),
    limit_rate, and ratio: rate / limit_rate, median over the turns.
    """
    rows = []
    for pair in pairs(shape, seed):
        pair.call()
        pair.limit()
        turns = [(clocked(pair.call, clock), clocked(pair.limit, clock)) for _ in range(rounds)]
        seconds, bound = (statistics.median(turn[side] for turn in turns) for side in (0, 1))
        ratio = statistics.median(theirs / own for own, theirs in turns)
        rows.append(
            {
                "operation": pair.operation,
                "dtype": pair.dtype,
                "backend": str(pair.backend),
                "milliseconds": 1e3 * seconds,
                "rate": pair.work / seconds / 1e9,
                "limit": pair.limit_name,
                "limit_rate": pair.limit_work / bound / 1e9,
                "ratio": ratio * pair.work / pair.limit_work,
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    columns = ["operation", "dtype", "backend", "limit", "ms", "rate", "limit's rate", "of limit"]
    lines = [
        [
            *(row[name] for name in ("operation", "dtype", "backend", "limit")),
            *(f"{row[name]:.3g}" for name in ("milliseconds", "rate", "limit_rate")),
            f"{100 * row['ratio']:.0f} %",
        ]
        for row in rows
    ]
    return table(columns, lines, 4)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each pair")
    parser.add_argument("--seed", type=int, default=0)
    add_outputs(parser)
    args = parser.parse_args()
    if args.shape[1] % BLOCK or min(*args.shape, args.threads, args.rounds) < 1:
        parser.error(f"all numbers are positive, the second side a multiple of {BLOCK}")
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    rows = measure(args.shape, args.rounds, args.seed, clock)
    options = {name: getattr(args, name) for name in ("shape", "threads", "rounds", "seed")}
    schema = {"schema": "mxtorq.benchmarks.limits", "version": 1}
    record = {**schema, **provenance(PACKAGES), **options, "rows": rows}
    text = (
        f"Tensor {args.shape}, {args.threads} thread(s), medians of {args.rounds} turns. Rates in "
        "GB/s (read + written) beside a copy, in GFLOP/s beside a matrix product."
    )
    write(args, record, "\n\n".join([heading(record), text, report(rows)]))


if __name__ == "__main__":
    main()
