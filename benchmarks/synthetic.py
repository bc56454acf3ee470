"""How much of a linear's output MXFP4 loses on data whose defects are known, method by method.

    python benchmarks/synthetic.py --seeds 6 --json out.json --markdown out.md

Inputs are 64 common Gaussian factors seen through a random matrix, plus noise of each channel's
own; the weight is Gaussian. The kinds of data share these draws and differ in six channels:

    none          as drawn
    outliers      the channels, anywhere, are 10 to 40 times as large
    adjacent      the same factors on neighbours in one block
    compensated   as outliers, and the weights that meet these channels divided by as much

Transforms are fitted to, and weights rounded with, the first half of the tokens. The figure is
||y - y_q||^2 / ||y||^2 over the second half, which nothing saw; with ``--exact-inputs`` weights
alone are rounded. A figure is the mean over seeds, and every seed's value stands in the JSON. It is
not a forecast for a model: real channels are not Gaussian, and errors of layers meet.
"""

import argparse
import statistics
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxtorq import MxtorqError
from mxtorq.config import parse_method, parse_rounding
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import dequantize, fake_quantize
from mxtorq.models.family import SiteName
from mxtorq.rounding.base import Rounding
from mxtorq.transforms.base import SiteStatistics, TransformMethod
from record import add_outputs, heading, provenance, table, write

WIDTH, OUTPUTS, FACTORS, OUTLIERS, TOKENS = 256, 192, 64, 6, 2048
NOISE = 0.25  # standard deviation of a channel's own noise; that of its factors' part is about 1
KINDS = ("none", "outliers", "adjacent", "compensated")
METHODS = (
    "identity,hadamard,torq,smoothquant:sites=all,perq,duquant++,duquant++:index=column,"
    "duquant++:smooth=false,wush:hadamard=false,wush,wush:curvature=conditional,"
    "hires:interaction=false:balance=false,hires:balance=false,hires:interaction=false,hires"
)
ROUNDINGS = "rtn,gptq,gptq:order=backward"
SCALE = ScaleRule.FLOOR
PACKAGES = ("mxtorq", "torch", "numpy")


class Data(NamedTuple):
    """One kind of data, one seed: float32, a row a token or an output."""

    fitted: Tensor
    evaluated: Tensor
    weight: Tensor


def draw(kind: str, seed: int) -> Data:
    """The same draws for every kind; only what the kind does to its channels differs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    loadings = normal(FACTORS, WIDTH) / FACTORS**0.5
    inputs = normal(2 * TOKENS, FACTORS) @ loadings + NOISE * normal(2 * TOKENS, WIDTH)
    weight = normal(OUTPUTS, WIDTH) / WIDTH**0.5
    sizes = 10 + 30 * torch.rand(OUTLIERS, generator=generator)
    where = torch.randperm(WIDTH, generator=generator)[:OUTLIERS]
    if kind == "adjacent":
        where = where[0] // BLOCK * BLOCK + torch.arange(OUTLIERS)
    if kind != "none":
        inputs[:, where] *= sizes
    if kind == "compensated":
        weight[:, where] /= sizes
    return Data(inputs[:TOKENS], inputs[TOKENS:], weight)


def losses(
    data: Data, method: TransformMethod, roundings: list[Rounding], seed: int, exact_inputs: bool
) -> list[float]:
    """The relative squared error of the output, rounding by rounding."""
    fitted = data.fitted.double()
    hessian = fitted.T @ fitted / len(fitted)
    seen = SiteStatistics(
        site=f"model.layers.0.{SiteName.DOWN_IN}",
        name=SiteName.DOWN_IN,
        tokens=len(fitted),
        second_moment=hessian,
        amax=data.fitted.abs().amax(0),
        sample=data.fitted,
        weights=(data.weight,),
    )
    transform = method.fit(seen, seed)
    inputs = transform.apply(data.evaluated)
    if not exact_inputs:
        inputs = fake_quantize(inputs, SCALE)
    moved = transform.apply(transform.apply(hessian).T)
    weight = transform.fuse(data.weight.double()).float()
    output = data.evaluated.double() @ data.weight.double().T

    def loss(rounding: Rounding) -> float:
        rounded = dequantize(rounding.round(weight, lambda: moved, SCALE))
        error = inputs.double() @ rounded.double().T - output
        return float(error.square().sum() / output.square().sum())

    return [loss(rounding) for rounding in roundings]


def measure(
    methods: list[str], roundings: list[str], seeds: int, exact_inputs: bool
) -> list[dict[str, Any]]:
    """A row for each kind, method and rounding, with the losses of all seeds."""
    rows = []
    rounders = [parse_rounding(spec) for spec in roundings]
    for kind in KINDS:
        for spec in methods:
            print(f"{kind}: {spec}", file=sys.stderr)
            method = parse_method(spec)
            found = [
                losses(draw(kind, seed), method, rounders, seed, exact_inputs)
                for seed in range(seeds)
            ]
            for rounding, *values in zip(roundings, *found, strict=True):
                row = {"data": kind, "method": spec, "rounding": rounding}
                rows.append({**row, "mean": statistics.mean(values), "seeds": values})
    return rows


def report(record: dict[str, Any], methods: list[str], roundings: list[str]) -> str:
    """A line a method, a column for each kind of data and rounding."""
    mean = {(row["data"], row["method"], row["rounding"]): row["mean"] for row in record["rows"]}
    inputs = "exact: weight-only" if record["exact_inputs"] else "rounded: W4A4"
    text = [
        heading(record),
        f"Relative squared error of the output × 1000, mean of {record['seeds']} seed(s). Width "
        f"{WIDTH}, {OUTPUTS} outputs, {FACTORS} common factors, {TOKENS} tokens fitted to and "
        f"{TOKENS} others evaluated, scale rule {SCALE}; inputs {inputs}.",
    ]
    for kind in KINDS:
        lines = [
            [method, *(f"{1e3 * mean[kind, method, rounding]:.3g}" for rounding in roundings)]
            for method in methods
        ]
        text.append(table([f"data: {kind}", *roundings], lines, 1))
    return "\n\n".join(text)


def main() -> None:
    """Fit, round, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=METHODS, help="separated by commas")
    parser.add_argument("--roundings", default=ROUNDINGS, help="separated by commas")
    parser.add_argument("--seeds", type=int, default=6, help="0 to N - 1")
    parser.add_argument("--exact-inputs", action="store_true", help="round weights alone")
    add_outputs(parser)
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds is positive")
    methods, roundings = args.methods.split(","), args.roundings.split(",")
    torch.set_num_threads(1)  # the order of sums, and so the last digits, depend on it
    try:
        rows = measure(methods, roundings, args.seeds, args.exact_inputs)
    except MxtorqError as error:
        sys.exit(str(error))
    schema = {"schema": "mxtorq.benchmarks.synthetic", "version": 1}
    options = {"seeds": args.seeds, "exact_inputs": args.exact_inputs}
    record = {**schema, **provenance(PACKAGES), **options, "rows": rows}
    write(args, record, report(record, methods, roundings))


if __name__ == "__main__":
    main()
