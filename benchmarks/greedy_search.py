"""What the pruning in DuQuant's greedy search saves, beside the same search over all rows.

    python benchmarks/greedy_search.py --rows 131072 --steps 128 --rounds 3 --json out.json

`mxtorq.transforms.duquant.greedy` leaves out rows whose norm shows that they cannot hold an
extreme. How many these are depends on the data alone, so there are four kinds: Gaussian rows and
rows of heavy tails (Student's t, 3 degrees of freedom), each with 12 of 256 channels 10 to 40 times
as large and without. First both searches run once and must agree on every channel and on the length
of the prefix; then they take turns, A B A B, and their ratio is the median of the turns' ratios.
The clock is CPU time, which other programs disturb least, and there is one thread.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.duquant.greedy import (
    Index,
    exchange,
    greedy_rotation,
    random_base,
    tie_width,
)
from record import add_outputs, heading, provenance, table, write

WIDTH, OUTLIERS, DEGREES = 256, 12, 3
KINDS = ("gaussian, outliers", "heavy tails, outliers", "heavy tails", "gaussian")
PACKAGES = ("mxtorq", "torch", "numpy")


def draw(kind: str, rows: int, seed: int, width: int = WIDTH) -> Tensor:
    """Tokens of ``width`` channels as rows of 32, in the order of the text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(rows * BLOCK // width, width, generator=generator)
    if kind.startswith("heavy"):
        squares = torch.randn(DEGREES, *tokens.shape, generator=generator).square().mean(0)
        tokens /= squares.sqrt()
    if kind.endswith("outliers"):
        where = torch.randperm(width, generator=generator)[:OUTLIERS]
        tokens[:, where] *= 10 + 30 * torch.rand(OUTLIERS, generator=generator)
    return tokens.reshape(-1, BLOCK)


def full_search(rows: Tensor, base: Tensor, steps: int) -> tuple[int, ...]:
    """The channels of the best prefix; every step rotates and reads all rows."""
    data = rows.double()
    tie = tie_width(float(data.norm(dim=1).max()), BLOCK, steps)
    lowest, length = math.inf, 0
    channels: list[int] = []
    for step in range(steps + 1):
        low, high = (float(value) for value in torch.aminmax(data))
        if high - low < lowest - 2 * tie:
            lowest, length = high - low, step
        if step < steps:
            ties = data >= high - tie if high > -low + tie else data <= low + tie
            channels.append(int(ties.any(1).int().argmax()) % BLOCK)
            data = data @ exchange(base, channels[-1])
    return tuple(channels[:length])


def clocked(call: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def compare(kind: str, rows: int, steps: int, rounds: int, seed: int) -> dict[str, Any]:
    """Both searches on one kind of data, checked and timed in turns."""
    data = draw(kind, rows, seed)
    base = random_base(BLOCK, torch.Generator().manual_seed(seed))

    def pruned() -> tuple[int, ...]:
        return greedy_rotation(data, base, steps=steps, index=Index.ROW).channels

    def full() -> tuple[int, ...]:
        return full_search(data, base, steps)

    prefix = pruned()
    if prefix != full():
        sys.exit(f"{kind}: the two searches differ, so that there is nothing to time")
    turns = [(clocked(full), clocked(pruned)) for _ in range(rounds)]
    return {
        "data": kind,
        "prefix": len(prefix),
        "full_seconds": statistics.median(slow for slow, _ in turns),
        "pruned_seconds": statistics.median(fast for _, fast in turns),
        "ratio": statistics.median(slow / fast for slow, fast in turns),
        "turns": turns,
    }


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=131_072, help=f"a multiple of {WIDTH // BLOCK}")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pair")
    parser.add_argument("--seed", type=int, default=0)
    add_outputs(parser)
    args = parser.parse_args()
    if min(args.rows, args.steps, args.rounds) < 1 or args.rows % (WIDTH // BLOCK):
        parser.error(f"all numbers are positive, --rows a multiple of {WIDTH // BLOCK}")
    torch.set_num_threads(1)
    found = [compare(kind, args.rows, args.steps, args.rounds, args.seed) for kind in KINDS]
    options = {name: getattr(args, name) for name in ("rows", "steps", "rounds", "seed")}
    schema = {"schema": "mxtorq.benchmarks.greedy_search", "version": 1}
    record = {**schema, **provenance(PACKAGES), **options, "kinds": found}
    columns = ["data", "best prefix", "full, CPU s", "pruned, CPU s", "full / pruned"]
    lines = [
        [row["data"], str(row["prefix"])]
        + [f"{row[name]:.3g}" for name in ("full_seconds", "pruned_seconds", "ratio")]
        for row in found
    ]
    text = (
        f"{args.rows} rows of {BLOCK}, {args.steps} steps, one thread, medians of {args.rounds} "
        "turns. Both searches chose the same channels and the same prefix."
    )
    write(args, record, "\n\n".join([heading(record), text, table(columns, lines, 1)]))


if __name__ == "__main__":
    main()
