"""The searches for rotations, and the chain of Givens rotations, on every backend of the CPU.

    python benchmarks/searches.py --rounds 5 --json out.json

TORQ's Algorithm 1 (Schur-Horn) on B x B second moments; its Algorithm 2 (R_intra) on 8192 pooled
blocks with the method's defaults; the chain that Algorithm 1 finds, applied to activations beside
the dense B x B product; and DuQuant's greedy search, 256 steps on 2048 tokens of 4096 channels,
whose cost depends on the data, of the kinds of ``greedy_search.py``. It has one backend: torch.

Backends must give the same bits, and the dense product the chain's values within the rounding of
both, before they are timed; then they take turns, A B A B. Times are medians of CPU time on one
thread; a ratio is the median of the turns' ratios to the first line of its group.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from greedy_search import KINDS, clocked, draw
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.duquant.greedy import Index, greedy_rotation, random_base
from mxtorq.transforms.torq.inter_block import GivensChain, equalize
from mxtorq.transforms.torq.intra_block import maximize_entropy
from mxtorq.transforms.torq.method import TORQ
from record import add_outputs, heading, provenance, table, write

BLOCKS = (128, 448, 864)
"""Blocks of 32 in the inputs of down_proj of 4096, 14336 and 27648 features."""
ELEMENTS = 2**22
TOKENS, CHANNELS, STEPS = 2048, 4096, 256
PACKAGES = ("mxtorq", "torch", "numpy", "numba")


@dataclass(frozen=True)
class Contest:
    """Calls that do the same work."""

    operation: str
    shape: str
    calls: Mapping[str, Callable[[], Any]]
    """By backend; the first is what the others are compared with."""
    same: Callable[[Any, Any, str], bool]
    """Whether the first result and that of a backend agree."""
    elements: int = 0
    """What goes through a call, where its speed is the question."""


def backends() -> list[str]:
    """Those that this machine has for its CPU."""
    return ["eager", "numba"] if find_spec("numba") else ["eager"]


def second_moment(size: int, seed: int) -> Tensor:
    """Of blocks whose variances span a factor 1000."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, 2 * size, dtype=torch.float64, generator=generator)
    root *= 1000 ** (torch.rand(size, 1, dtype=torch.float64, generator=generator) / 2)
    return root @ root.T / (2 * size)


def parts(chain: GivensChain) -> list[Tensor]:
    """Everything that a chain is."""
    return [chain.first, chain.second, chain.cos, chain.sin]


def contests(seed: int) -> Iterator[Contest]:
    """All of them, made when their turn comes."""
    for size in BLOCKS:
        sigma = second_moment(size, seed)
        calls = {name: partial(equalize, sigma, backend=name) for name in backends()}
        yield Contest("Schur-Horn", f"B = {size}", calls, _same_chain)
    for size in BLOCKS:
        yield chain_contest(equalize(second_moment(size, seed)), size, seed)
    yield intra_contest(seed)
    base = random_base(BLOCK, torch.Generator().manual_seed(seed))
    for kind in KINDS:
        rows = draw(kind, TOKENS * CHANNELS // BLOCK, seed, CHANNELS)
        search = partial(greedy_rotation, rows, base, steps=STEPS, index=Index.ROW)
        shape = f"{TOKENS} x {CHANNELS}, {kind}"
        yield Contest(f"greedy, {STEPS} steps", shape, {"eager": search}, lambda *_: True)


def chain_contest(chain: GivensChain, size: int, seed: int) -> Contest:
    """R^T X by the dense matrix and by the chain."""
    tokens = ELEMENTS // (size * BLOCK)
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(tokens, size, BLOCK, generator=generator)
    exact = chain.apply(blocks.double())
    dense = chain.matrix(size).T.float().contiguous()
    calls: dict[str, Callable[[], Any]] = {"dense": partial(torch.matmul, dense, blocks)}
    calls |= {name: partial(chain.apply, blocks, backend=name) for name in backends()}
    # A column of B values loses 4 roundings a rotation, or B roundings of a product, of its norm.
    bound = 4 * size * torch.finfo(torch.float32).eps * blocks.norm(dim=1, keepdim=True)

    def same(first: Tensor, other: Tensor, name: str) -> bool:
        close = all(bool(((y - exact).abs() <= bound).all()) for y in (first, other))
        return close and (name == "dense" or torch.equal(other, calls["eager"]()))

    shape = f"{tokens} x {size} x {BLOCK}"
    return Contest("R_inter, float32", shape, calls, same, blocks.numel())


def intra_contest(seed: int) -> Contest:
    """Algorithm 2 on activations with 12 outlier channels."""
    method = TORQ()
    rows = draw("gaussian, outliers", method.blocks, seed, CHANNELS)
    names = ("s_step", "rounds", "top", "pairs", "complementarity", "tolerance")
    fit = partial(maximize_entropy, rows, **{name: getattr(method, name) for name in names})
    calls = {name: partial(fit, backend=name) for name in backends()}

    def same(first: Any, other: Any, _: str) -> bool:
        return torch.equal(first.rotation, other.rotation) and first.losses == other.losses

    return Contest("R_intra", f"{method.blocks} x {BLOCK}", calls, same)


def measure(rounds: int, seed: int) -> list[dict[str, Any]]:
    """A row for each operation, shape and backend, on one thread from here on.

    Keys: operation, shape, backend, milliseconds, ratio (of the first backend's time to this one's;
    above 1 is faster) and gigaelements (a second; None where nothing flows through).
    """
    torch.set_num_threads(1)
    rows = []
    for contest in contests(seed):
        results = {name: call() for name, call in contest.calls.items()}
        first, *_ = results
        for name, result in results.items():
            if not contest.same(results[first], result, name):
                sys.exit(f"{contest.operation}, {contest.shape}: {name} computes something else")
        turns = [
            {name: clocked(call) for name, call in contest.calls.items()} for _ in range(rounds)
        ]
        for name in contest.calls:
            seconds = statistics.median(turn[name] for turn in turns)
            rows.append(
                {
                    "operation": contest.operation,
                    "shape": contest.shape,
                    "backend": name,
                    "milliseconds": 1e3 * seconds,
                    "ratio": statistics.median(turn[first] / turn[name] for turn in turns),
                    "gigaelements": contest.elements / seconds / 1e9 if contest.elements else None,
                }
            )
    return rows


def _same_chain(first: GivensChain, other: GivensChain, _: str) -> bool:
    return all(torch.equal(a, b) for a, b in zip(parts(first), parts(other), strict=True))


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each group")
    parser.add_argument("--seed", type=int, default=0)
    add_outputs(parser)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds is positive")
    rows = measure(args.rounds, args.seed)
    schema = {"schema": "mxtorq.benchmarks.searches", "version": 1}
    options = {"rounds": args.rounds, "seed": args.seed}
    record = {**schema, **provenance(PACKAGES), **options, "rows": rows}
    columns = ["operation", "shape", "backend", "CPU ms", "times as fast", "Gelements/s"]
    lines = [
        [
            *(row[name] for name in ("operation", "shape", "backend")),
            *(f"{row[name]:.3g}" for name in ("milliseconds", "ratio")),
            f"{row['gigaelements']:.3g}" if row["gigaelements"] else "",
        ]
        for row in rows
    ]
    text = (
        f'One thread, medians of {args.rounds} turns; "times as fast" as the first of a group. '
        "Backends gave the same bits."
    )
    write(args, record, "\n\n".join([heading(record), text, table(columns, lines, 3)]))


if __name__ == "__main__":
    main()
