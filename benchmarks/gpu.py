"""How fast a GPU turns tensors into MXFP4, rotates, compensates and multiplies, by Triton kernels.

    python benchmarks/gpu.py --json gpu.json --markdown gpu.md

Each kernel is paired with eager torch that does the same work on the same device (products: with
torch's BF16 product of the dequantized operands). Before a pair is timed its results are compared:
kernels that promise the bits of eager torch by equality, sums whose order is the compiler's by how
many bytes differ from the exact sum's, products by the largest error in units of its bound. A case
that cannot run or whose bits differ is reported and does not stop the others; the exit code is 1
then. The two of a pair take turns, and their ratio is the median of the turns' ratios.

A turn empties the second-level cache by writing a large buffer, which also hides the time that
Python takes to launch; so the figures are what a kernel takes when its data lie in memory. The
device's own limits stand beside them: copying, and a BF16 matrix product.
"""

import argparse
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpu_cases import (
    RULE,
    Call,
    Case,
    conversions,
    groups,
    moved,
    products,
    rotations,
    two_levels,
)
from mxtorq.formats.spec import BLOCK
from record import add_outputs, heading, provenance, table, write

PACKAGES = ("mxtorq", "torch", "triton", "numpy")
FLUSH = 1 << 29  # bytes written before a timed call
GEMM_SIDE = 8192


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case, measured."""

    name: str
    result: str
    kernel_ms: float
    eager_ms: float
    ratio: float
    """Eager time over the kernel's, median over the turns."""
    gbytes_per_s: float
    tflop_per_s: float


def milliseconds(call: Call, flush: Tensor) -> float:
    """Device time of a call, its data out of the cache."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))


def measure(case: Case, rounds: int, flush: Tensor) -> Row | str:
    """A row, or why there is none."""
    mine, theirs = case.kernel(), case.peer()
    difference = case.check(mine, theirs)
    note = case.note(mine, theirs)
    del mine, theirs
    if difference:
        return difference
    turns = [
        [milliseconds(call, flush) for call in (case.kernel, case.peer)] for _ in range(rounds)
    ]
    ours, other = (statistics.median(turn[side] for turn in turns) for side in (0, 1))
    return Row(
        name=case.name,
        result=note,
        kernel_ms=ours,
        eager_ms=other,
        ratio=statistics.median(b / a for a, b in turns),
        gbytes_per_s=case.gbytes / ours * 1e3,
        tflop_per_s=case.tflop / ours * 1e3,
    )


def limits(rounds: int, flush: Tensor, device: torch.device) -> dict[str, float]:
    """Copying in memory, and a BF16 matrix product."""
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    left, right = torch.randn(2, GEMM_SIDE, GEMM_SIDE, device=device).bfloat16()

    def seconds(call: Call) -> float:
        call()
        return statistics.median(milliseconds(call, flush) for _ in range(rounds)) / 1e3

    return {
        "copy_gbytes_per_s": 2 * moved(source) / seconds(lambda: target.copy_(source)),
        "bf16_gemm_tflop_per_s": 2e-12 * GEMM_SIDE**3 / seconds(lambda: left @ right),
    }


def report(record: dict[str, Any], rows: list[Row]) -> str:
    """Everything as text."""
    machine = record["machine"]
    columns = ["case", "result", "kernel ms", "eager ms", "eager / kernel", "GB/s", "of copy"]
    lines = [
        [
            *(row.name, row.result, f"{row.kernel_ms:.3f}", f"{row.eager_ms:.3f}"),
            *(f"{row.ratio:.2f}", f"{row.gbytes_per_s:.0f}"),
            f"{row.gbytes_per_s / machine['copy_gbytes_per_s']:.0%}",
            f"{row.tflop_per_s:.1f}",
        ]
        for row in rows
    ]
    text = [
        heading(record),
        f"{record['device']}, compute capability {record['capability']}. Copies at "
        f"{machine['copy_gbytes_per_s']:.0f} GB/s (read + written), BF16 product of "
        f"{GEMM_SIDE}^3 at {machine['bf16_gemm_tflop_per_s']:.0f} TFLOP/s. Scale rule {RULE}; "
        f"medians of {record['rounds']} turns. Eager is eager torch on the same device; for "
        "products it is torch's BF16 product.",
        table([*columns, "TFLOP/s"], lines, 2) if rows else "",
        *(f"Not timed: {line}." for line in record["not_timed"]),
    ]
    return "\n\n".join(filter(None, text))


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=[16384, 4096], metavar="N")
    parser.add_argument("--tokens", type=int, default=4096, help="of TORQ's pair")
    parser.add_argument("--rounds", type=int, default=21, help="turns of each pair")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    add_outputs(parser)
    args = parser.parse_args()
    if args.shape[1] % BLOCK or min(*args.shape, args.tokens, args.rounds) < 1:
        parser.error(f"sizes are positive, and the second of --shape is a multiple of {BLOCK}")
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU here, and this benchmark measures nothing else.")
    if find_spec("triton") is None:
        sys.exit("Triton is not installed: pip install 'mxtorq[triton]'.")
    torch.set_grad_enabled(False)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda")
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    rows: list[Row] = []
    not_timed: list[str] = []
    chapters: dict[str, Callable[[], Iterator[Case]]] = {
        "conversions": lambda: conversions(args.shape, device),
        "rotations": lambda: rotations(args.shape, device),
        "TORQ pair": lambda: two_levels(args.tokens, device),
        "GPTQ": lambda: groups(device),
        "products": lambda: products(device),
    }
    for chapter, cases in chapters.items():
        name = chapter
        try:
            for case in cases():
                name = case.name
                if args.only not in name:
                    continue
                try:
                    done = measure(case, args.rounds, flush)
                except Exception as error:
                    traceback.print_exc()
                    done = f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
                if isinstance(done, Row):
                    rows.append(done)
                else:
                    not_timed.append(f"{name}: {done}")
                print(f"{name}: {done}", file=sys.stderr)
        except Exception as error:  # while a case was made: the next chapter may still work
            traceback.print_exc()
            not_timed.append(f"{chapter} after {name}: {type(error).__name__}: {error}")
    record = {
        "schema": "mxtorq.benchmarks.gpu",
        "version": 1,
        **provenance(PACKAGES),
        "device": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "shape": args.shape,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "machine": limits(args.rounds, flush, device),
        "rows": [asdict(row) for row in rows],
        "not_timed": not_timed,
    }
    write(args, record, report(record, rows))
    sys.exit(1 if not_timed else 0)


if __name__ == "__main__":
    main()
