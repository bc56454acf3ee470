"""Where GPTQ and calibration spend their time, each stage beside the obvious way to do it.

    python benchmarks/gptq.py --shape 4096 4096 --rounds 3 --json out.json

A linear with Gaussian weights reads inputs whose channels are correlated. Stages of `GPTQ.round`:

    factor          Cholesky and what is made of it; beside it with the inverse of the triangle,
                    which GPTQ's own formulation needs
    group steps     the inner loop over columns, by numba; beside it by torch
    updates         what a block does to all later columns: matrix products alone
    who wins a row  bounds in float32, float64 where they leave a doubt; beside it two goals in
                    float64
    round           the whole, by numba; beside it by torch
    exponents       the search over three exponents for the whole weight, by numba and by torch

and of calibration the sums over 4096 tokens, beside a float64 product of the whole square. Results
are compared before anything is timed. Then both ways take turns, A B A B, and a ratio is the median
of the turns' ratios. The clock is CPU time, which other programs disturb least, on one thread.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mxtorq.calibration.statistics import add_products_, channel_amax, mirror_
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import assemble
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import dequantize
from mxtorq.rounding.exponents import search_exponents
from mxtorq.rounding.factor import factorize
from mxtorq.rounding.goal import better_rows, goal, no_sums
from mxtorq.rounding.gptq import GPTQ
from mxtorq.rounding.group import fix_group_
from mxtorq.rounding.rtn import RTN
from record import add_outputs, heading, provenance, table, write

PACKAGES = ("mxtorq", "torch", "numpy", "numba")
TOKENS, STEP, DAMPING, RULE = 4096, 128, 0.01, ScaleRule.FLOOR

Call = Callable[[], object]


def clocked(call: Call) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def draw(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and the inputs of a calibration batch: every channel leans on a few of the others,
    one in a hundred is 20 times as large."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, width, generator=generator)
    inputs = torch.randn(TOKENS, width, generator=generator)
    few = torch.randn(TOKENS, 64, generator=generator)
    inputs.addmm_(few, torch.randn(64, width, generator=generator), alpha=0.1)
    inputs[:, ::100] *= 20
    return weight, inputs


def hessian_sums(inputs: Tensor) -> Tensor:
    """As `SiteAccumulator` makes them."""
    if not bool(torch.isfinite(channel_amax(inputs)).all()):
        sys.exit("the inputs are broken")
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    add_products_(total, inputs)
    mirror_(total)
    return total


def hessian_plainly(inputs: Tensor) -> Tensor:
    """A look at each number, a maximum, and one float64 product."""
    if not bool(torch.isfinite(inputs).all()):
        sys.exit("the inputs are broken")
    inputs.abs().amax(0)
    wide = inputs.double()
    return wide.T @ wide


def inverse_of_triangle(moment: Tensor) -> Tensor:
    """What GPTQ's own formulation moves weights with."""
    damped = moment.flip(0, 1)
    damped.diagonal().add_(DAMPING * moment.diagonal().mean())
    lower = torch.linalg.cholesky(damped)
    identity = torch.eye(len(lower), dtype=torch.float64)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    inverse /= inverse.diagonal().clone()[:, None]
    return inverse.float().flip(0, 1)


def group_steps(columns: Tensor, follow: Tensor, backend: str) -> Tensor:
    """All groups of a weight, as if no earlier one had moved them; returns the codes."""
    scales = torch.empty(len(columns) // BLOCK, columns.shape[1])
    codes = [
        fix_group_(part.clone(), follow[at], scales, [at] * BLOCK, RULE, backend)
        for at, part in enumerate(columns.split(BLOCK))
    ]
    return torch.cat(codes)


def updates(pull: Tensor, errors: Tensor) -> Tensor:
    """What each block of columns does to all later ones."""
    moves = torch.zeros_like(errors)
    for start in range(0, len(errors), STEP):
        stop = start + STEP
        moves[stop:].addmm_(pull[stop:, start:stop], errors[start:stop])
    return moves


def pairs(rows: int, width: int, seed: int) -> dict[str, tuple[Call, tuple[str, Call] | None]]:
    """The stages by name; each may have another way, which is compared with it here."""
    weight, inputs = draw(rows, width, seed)
    sums = hessian_sums(inputs)
    product = hessian_plainly(inputs)
    size = product.diagonal().sqrt()
    if float(((sums - product).abs() / size[:, None] / size).max()) > TOKENS * 2.0**-24:
        sys.exit("the Hessians differ by more than their bound")
    moment = sums / TOKENS
    factor = factorize(moment, torch.arange(width), DAMPING)
    compiled = ["numba"] if find_spec("numba") else []
    found: dict[str, tuple[Call, tuple[str, Call] | None]] = {
        "factor": (
            lambda: factorize(moment, torch.arange(width), DAMPING),
            ("with inverse", lambda: inverse_of_triangle(moment)),
        )
    }

    def beside_eager(name: str, work: Callable[[str], Any]) -> None:
        for backend in compiled:
            first, second = (torch.cat([*work(by)]) for by in (backend, "eager"))
            if not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
                sys.exit(f"{name}: {backend} and eager differ, so that there is nothing to time")
            other = ("eager", lambda: work("eager"))
            found[f"{name}, {backend}"] = (lambda by=backend: work(by)), other  # type: ignore[misc]
        if not compiled:
            found[f"{name}, eager"] = (lambda: work("eager")), None

    columns = factor.columns(weight)
    beside_eager("group steps", lambda by: [group_steps(columns, factor.follow, by)])
    found["updates"] = (lambda: updates(factor.pull, columns)), None
    plain = RTN().round(weight, lambda: moment, RULE)
    ours = assemble(*GPTQ(damping=DAMPING).compensated(weight, moment, RULE), RULE)
    own, errors = no_sums(rows, weight.device), factor.columns(weight - dequantize(ours))
    own.add_errors_(factor, slice(0, width), errors)
    own.add_outputs_(factor, slice(0, width), factor.pull @ errors)

    def bounded() -> Tensor:
        return better_rows(own, width, ours, plain, weight, moment, factor)

    def by_goals() -> Tensor:
        return goal(ours, weight, moment) < goal(plain, weight, moment)

    if not torch.equal(bounded(), by_goals()):
        sys.exit("who wins: bounds and float64 differ, so that there is nothing to time")
    found["who wins a row"] = bounded, ("float64", by_goals)
    beside_eager(
        "round",
        lambda by: [
            part.flatten()
            for part in GPTQ(damping=DAMPING).round(weight, lambda: moment, RULE, backend=by)
        ],
    )
    blocks = weight.view(-1, BLOCK)
    beside_eager("exponents", lambda by: [search_exponents(blocks, RULE, backend=by)])
    found[f"Hessian of {TOKENS} tokens"] = (
        lambda: hessian_sums(inputs),
        ("float64", lambda: hessian_plainly(inputs)),
    )
    return found


def measure(rounds: int, seed: int, side: int, rows: int | None = None) -> list[dict[str, Any]]:
    """Seconds of every stage for a weight [side, side], or [rows, side]."""
    found = []
    for name, (call, other) in pairs(side if rows is None else rows, side, seed).items():
        turns = [
            (clocked(call), clocked(other[1]) if other else None) for _ in range(max(1, rounds))
        ]
        seconds = [first for first, _ in turns]
        others = [second for _, second in turns if second is not None]
        ratios = [second / first for first, second in turns if second is not None]
        found.append(
            {
                "stage": name,
                "shape": [side if rows is None else rows, side],
                "seconds": statistics.median(seconds),
                "other": other[0] if other else None,
                "other_seconds": statistics.median(others) if others else None,
                "ratio": statistics.median(ratios) if ratios else None,
                "turns": turns,
            }
        )
    return found


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], metavar=("ROWS", "D"))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pair")
    parser.add_argument("--seed", type=int, default=0)
    add_outputs(parser)
    args = parser.parse_args()
    rows, width = args.shape
    if min(rows, width, args.rounds) < 1 or width % BLOCK:
        parser.error(f"all numbers are positive, and the width is a multiple of {BLOCK}")
    torch.set_num_threads(1)
    stages = measure(args.rounds, args.seed, width, rows)
    options = {name: getattr(args, name) for name in ("shape", "rounds", "seed")}
    schema = {"schema": "mxtorq.benchmarks.gptq", "version": 1}
    record = {**schema, **provenance(PACKAGES), **options, "stages": stages}
    columns = ["stage", "the other way", "CPU s", "other, CPU s", "other / stage"]
    lines = [
        [row["stage"], row["other"] or "-"]
        + ["-" if row[name] is None else f"{row[name]:.3g}" for name in NUMBERS]
        for row in stages
    ]
    text = f"A weight [{rows}, {width}], one thread, medians of {args.rounds} turns."
    write(args, record, "\n\n".join([heading(record), text, table(columns, lines, 2)]))


NUMBERS = ("seconds", "other_seconds", "ratio")

if __name__ == "__main__":
    main()
