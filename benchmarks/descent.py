"""What GPTQ's search by outputs and its sweeps of coordinate descent gain, and what they cost.

The mean over rows of the goal (q - w) H (q - w)^T on weights and inputs that are drawn, relative to
that of GPTQ with the rule's exponent, and process time relative to it (medians of runs in turns).
"fresh" is the same goal under the H of as many other inputs, which no rounding has seen. Inputs are
correlated (half as many directions as channels, and a little noise), or also of very different size
by channel. Quality of a model is another matter.
"""

import argparse
import statistics
import sys
import time

import torch

from mxtorq.config import parse_rounding
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import ScaledE2M1
from mxtorq.rounding.base import Rounding
from mxtorq.rounding.goal import goal

WAYS = (
    "gptq",
    "gptq:sweeps=1",
    "gptq:sweeps=2",
    "gptq:sweeps=4",
    "gptq:exponents=3",
    "gptq:exponents=3:sweeps=2",
    "gptq:exponents=3:search=outputs",
    "gptq:exponents=3:search=outputs:sweeps=1",
    "gptq:exponents=3:search=outputs:sweeps=2",
    "gptq:exponents=3:search=outputs:sweeps=4",
    "gptq:order=descending:scales=static",
    "gptq:order=descending:scales=static:sweeps=2",
)
INPUTS = ("correlated", "anisotropic")


def problem(
    kind: str, rows: int, width: int, tokens: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, and the second moment of inputs and of others like them."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width // 2, width, generator=draw) / (width // 2) ** 0.5
    loud = torch.exp2(1.5 * torch.randn(width, generator=draw))
    weight = 0.02 * torch.randn(rows, width, generator=draw)
    moments = []
    for _ in range(2):
        inputs = torch.randn(tokens, width // 2, generator=draw) @ mixed
        inputs += 0.3 * torch.randn(tokens, width, generator=draw)
        inputs = (inputs * loud if kind == "anisotropic" else inputs).double()
        moments.append(inputs.T @ inputs / tokens)
    return weight, moments[0], moments[1]


def rounded(
    rounding: Rounding, weight: torch.Tensor, moment: torch.Tensor, rule: ScaleRule, backend: str
) -> MXFP4 | ScaledE2M1:
    return rounding.round(weight, lambda: moment, rule, backend=backend)


def main() -> int:
    """Print a table for each kind of inputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rule", type=ScaleRule, default=ScaleRule.FLOOR, choices=list(ScaleRule))
    parser.add_argument("--backend", default="auto")
    chosen = parser.parse_args()
    shape = chosen.rows, chosen.width, chosen.tokens
    roundings = {way: parse_rounding(way) for way in WAYS}
    goals: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for kind in INPUTS:
        drawn = [problem(kind, *shape, seed) for seed in range(chosen.seeds)]
        for way in WAYS:
            means: list[list[float]] = [[], []]
            for weight, moment, fresh in drawn:
                found = rounded(roundings[way], weight, moment, chosen.rule, chosen.backend)
                for place, each in enumerate((moment, fresh)):
                    means[place].append(float(goal(found, weight, each).mean()))
            goals[way] += means
    weight, moment, _ = problem(INPUTS[0], *shape, 0)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(chosen.rounds):
        for way in WAYS:
            before = time.process_time()
            rounded(roundings[way], weight, moment, chosen.rule, chosen.backend)
            times[way].append(time.process_time() - before)
    base = statistics.median(times[WAYS[0]])
    size = f"{shape[0]} x {shape[1]}, {shape[2]} tokens, rule {chosen.rule}"
    print(f"{size}, {chosen.seeds} seeds; gptq takes {base:.3f} s\n")
    print(f"| rounding | {' | '.join(f'{kind} | fresh' for kind in INPUTS)} | time |")
    print("| --- |" + " ---: |" * (2 * len(INPUTS) + 1))
    for way in WAYS:
        pairs = zip(goals[way], goals[WAYS[0]], strict=True)
        parts = [
            f"{statistics.mean(own / plain for own, plain in zip(*pair, strict=True)):.3f}"
            for pair in pairs
        ]
        print(f"| `{way}` | {' | '.join(parts)} | {statistics.median(times[way]) / base:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
