"""How fast a CPU turns tensors into MXFP4 and back, beside other libraries that do the same work.

    python benchmarks/throughput.py --shape 4096 4096 --threads 1 --rounds 7 --json out.json

Each library is paired with mxtorq under that library's own scale rule. Before a pair is timed, both
convert the tensor and every bit of the results is compared: a pair that disagrees is reported and
not timed, because it would not be the same work. Then the two take turns, A B A B, and their ratio
is the median of the turns' ratios, so that a machine that slows down slows both.

With one thread the clock is the process's CPU time, which other programs disturb least; with more
it is the wall. The machine's own limits stand beside the figures: copying into memory that exists
already, and an FP32 matrix product.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from libraries import (
    DTYPES,
    OPERATIONS,
    Library,
    disagreement,
    installed_peers,
    ours,
    special_differences,
)
from mxtorq.formats.spec import BLOCK
from record import add_outputs, heading, provenance, table, write

GEMM_SIDE = 2048
PACKAGES = ("mxtorq", "torch", "numpy", "torchao", "compressed-tensors", "ml_dtypes")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One library at one operation, measured in turns with its partner."""

    operation: str
    dtype: str
    library: str
    scale_rule: str
    cpu_ms: float
    wall_ms: float
    gelements_per_s: float
    gbytes_per_s: float
    """Bytes that the operation has to read and to write."""
    ratio: float
    """Time over mxtorq's, median over the turns; 1 for mxtorq itself."""


def clocked(call: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of a call, the release of its result included."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def time_pair(
    peer: Library, operation: str, values: Tensor, rounds: int, clock: int
) -> tuple[Row, Row]:
    """The rows of mxtorq and of a peer that took turns."""
    pair = (ours(peer.rule), peer)
    calls = [library.call(operation, values) for library in pair]
    for call in calls:
        call()
    turns = [[clocked(call) for call in calls] for _ in range(rounds)]
    ratio = statistics.median(theirs[clock] / own[clock] for own, theirs in turns)

    def row(side: int) -> Row:
        seconds = [statistics.median(turn[side][c] for turn in turns) for c in (0, 1)]
        return Row(
            operation=operation,
            dtype=str(values.dtype).removeprefix("torch."),
            library=pair[side].name,
            scale_rule=peer.rule.value,
            cpu_ms=seconds[0] * 1e3,
            wall_ms=seconds[1] * 1e3,
            gelements_per_s=values.numel() / seconds[clock] / 1e9,
            gbytes_per_s=bytes_moved(operation, values) / seconds[clock] / 1e9,
            ratio=ratio if side else 1.0,
        )

    return row(0), row(1)


def bytes_moved(operation: str, values: Tensor) -> float:
    """What an operation has to read and write: its input and its output, once each."""
    plain = values.numel() * values.element_size()
    packed = values.numel() / 2 + values.numel() / BLOCK
    return 2 * plain if operation == "fake_quantize" else plain + packed


def machine_limits(shape: list[int], rounds: int, clock: int) -> dict[str, float]:
    """Copying float32 into memory that exists already, and a float32 matrix product."""
    source, target = torch.randn(shape), torch.zeros(shape)
    left, right = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
    product = torch.zeros(GEMM_SIDE, GEMM_SIDE)

    def seconds(call: Callable[[], object]) -> float:
        call()
        return statistics.median(clocked(call)[clock] for _ in range(rounds))

    moved = 2 * source.numel() * source.element_size()
    return {
        "copy_gbytes_per_s": moved / seconds(lambda: target.copy_(source)) / 1e9,
        "fp32_gemm_gflop_per_s": 2e-9
        * GEMM_SIDE**3
        / seconds(lambda: torch.mm(left, right, out=product)),
    }


def measure(
    peers: list[Library], shape: list[int], rounds: int, clock: int, seed: int
) -> tuple[list[Row], list[str]]:
    """All rows, and the pairs that were not timed because their results differ."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape[-1], generator=generator).exp()  # channels of unequal size
    normal = torch.randn(shape, generator=generator) * spread
    rows: list[Row] = []
    not_timed: list[str] = []
    for operation in OPERATIONS:
        for dtype in DTYPES:
            values = normal.to(dtype)
            for peer in (peer for peer in peers if peer.offers(operation, dtype)):
                difference = disagreement(peer, operation, values)
                if difference:
                    not_timed.append(f"{operation} of {dtype} by {peer.name}: {difference} differ")
                else:
                    rows += time_pair(peer, operation, values, rounds, clock)
    return rows, not_timed


def report(record: dict[str, Any], rows: list[Row]) -> str:
    """Everything as text."""
    columns = ["operation", "dtype", "library", "scale rule", "CPU ms", "wall ms"]
    columns += ["Gelements/s", "GB/s", "time / mxtorq"]
    lines = [
        [
            *(row.operation, row.dtype, row.library, row.scale_rule),
            *(f"{row.cpu_ms:.1f}", f"{row.wall_ms:.1f}", f"{row.gelements_per_s:.3f}"),
            *(f"{row.gbytes_per_s:.2f}", f"{row.ratio:.2f}"),
        ]
        for row in rows
    ]
    limits, special = record["machine"], record["special_blocks"]
    text = [
        heading(record),
        f"Tensor {record['shape']}, {record['threads']} thread(s), medians of {record['rounds']} "
        f"turns; rates and ratios by {record['clock']}. Within a pair the results were equal bit "
        "for bit.",
        table(columns, lines, 4),
        f"This machine copies float32 into existing memory at {limits['copy_gbytes_per_s']:.1f} "
        f"GB/s (read + written) and multiplies float32 matrices at "
        f"{limits['fp32_gemm_gflop_per_s']:.0f} GFLOP/s.",
        *(f"Not timed, not the same work: {line}." for line in record["not_timed"]),
        "\n".join(f"- {name}: {note}." for name, note in record["notes"].items()),
    ]
    if special:
        text += [
            "Special blocks on which a library differs from mxtorq under the same rule:",
            table(list(special[0]), [list(row.values()) for row in special], len(special[0])),
        ]
    return "\n\n".join(filter(None, text))


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs="+", default=[4096, 4096], metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each pair")
    parser.add_argument("--seed", type=int, default=0)
    add_outputs(parser)
    args = parser.parse_args()
    if len(args.shape) != 2 or args.shape[1] % BLOCK:
        parser.error(f"--shape is a matrix whose second side is a multiple of {BLOCK}")
    if min(*args.shape, args.threads, args.rounds) < 1:
        parser.error("--shape, --threads and --rounds are positive")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    peers = installed_peers()
    if not peers:
        sys.exit("There is nothing to compare with; install one of those.")

    clock = 0 if args.threads == 1 else 1
    rows, not_timed = measure(peers, args.shape, args.rounds, clock, args.seed)
    record = {
        "schema": "mxtorq.benchmarks.throughput",
        "version": 1,
        **provenance(PACKAGES),
        "shape": args.shape,
        "threads": args.threads,
        "rounds": args.rounds,
        "clock": ("process CPU time", "wall time")[clock],
        "machine": machine_limits(args.shape, args.rounds, clock),
        "rows": [asdict(row) for row in rows],
        "not_timed": not_timed,
        "notes": {peer.name: peer.note for peer in peers},
        "special_blocks": special_differences(peers),
    }
    write(args, record, report(record, rows))


if __name__ == "__main__":
    main()
