"""What part of one row's loss another row leaves, from records of `mxtorq compare`; nothing is run.

    python benchmarks/worth.py docs/results/mxtorq-llama.json

For each profile of outliers in each record: the loss of perplexity over the unquantized model and
the KL of both rows, mean and standard deviation over seeds, and the ratio of the means. The
interval of a ratio is the bootstrap's, at 95 %: the windows of the text are drawn again, the same
for both rows, and the seeds of each. It is of percentiles, unlike that of a difference in tables of
`compare`: a ratio has no standard error of its own to divide by. With few seeds it is too narrow.
"""

import argparse
import math
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mxtorq.reports.against import BF16
from mxtorq.reports.intervals import RESAMPLES, require_paired
from mxtorq.reports.schema import Results, Row
from record import table

METHODS = "wush/gptq", "mxtorq/gptq:exponents=3:search=outputs:sweeps=2:inputs=corrected"


class Pair(NamedTuple):
    """Two rows of one model under one profile, all their seeds."""

    name: str
    baseline: Row
    rows: tuple[list[Row], list[Row]]


def pairs(path: Path, names: tuple[str, str], rule: str) -> list[Pair]:
    """The pairs of a record, by profile of outliers."""
    results = Results.from_json(path.read_text(encoding="utf-8"), str(path))
    found = []
    for baseline in (row for row in results.rows if row.method == BF16):
        here = [row for row in results.rows if row.outliers == baseline.outliers]
        first, second = (
            [r for r in here if f"{r.method}/{r.rounding}" == name and r.rules == rule]
            for name in names
        )
        if first and second:
            for figure in ("nll", "kl"):
                require_paired([*first, *second], figure)
            require_paired([baseline, *first])
            title = f"{path.stem}, {baseline.outliers or 'none'}"
            found.append(Pair(title, baseline, (first, second)))
    if not found:
        rows = sorted({f"{row.method}/{row.rounding}" for row in results.rows})
        sys.exit(f"{path} has no pair of {names[0]} and {names[1]} under {rule}, but {rows}")
    return found


def losses(rows: list[Row], baseline: Row, figure: str) -> NDArray[np.float64]:
    """By seed and window: nll above the baseline's, or KL, for each prediction."""
    each = len(baseline.windows["nll"]) / baseline.predictions
    sums = np.array([row.windows[figure] for row in rows])
    return each * (sums - np.array(baseline.windows[figure]) if figure == "nll" else sums)


def loss(values: NDArray[np.float64], figure: str) -> NDArray[np.float64]:
    """Of each seed: the loss of perplexity, or the KL."""
    means = values.mean(-1)
    lost: NDArray[np.float64] = np.expm1(means) if figure == "nll" else means
    return lost


def interval(pair: Pair, figure: str) -> tuple[float, float]:
    """Of the ratio of the second row's loss to the first one's."""
    draw = np.random.default_rng(0)
    both = [losses(rows, pair.baseline, figure) for rows in pair.rows]
    ratios = []
    for _ in range(RESAMPLES):
        windows = draw.integers(0, both[0].shape[1], both[0].shape[1])
        first, second = (
            loss(each[draw.integers(0, len(each), len(each))][:, windows], figure).mean()
            for each in both
        )
        ratios.append(second / first)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def cells(pair: Pair, figure: str) -> tuple[list[str], float]:
    """Both losses and the ratio as the table has them, and the ratio."""
    both = [loss(losses(rows, pair.baseline, figure), figure).tolist() for rows in pair.rows]
    scale, unit = (100, " %") if figure == "nll" else (1, "")
    if fmean(both[0]) <= 0:
        sys.exit(f"{pair.name}: the first row loses nothing, so there is no part of its loss")
    digits = max(2, 2 - math.floor(math.log10(scale * 1.01 * fmean(both[0]))))
    shown = [
        f"{scale * fmean(each):.{digits}f}"
        + (f" ± {scale * stdev(each):.{digits}f}" if len(each) > 1 else "")
        + unit
        for each in both
    ]
    ratio = fmean(both[1]) / fmean(both[0])
    low, high = interval(pair, figure)
    return [*shown, f"{ratio:.2f} [{low:.2f}, {high:.2f}]"], ratio


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument(
        "--rows", nargs=2, default=METHODS, metavar="METHOD/ROUNDING", help="default: %(default)s"
    )
    parser.add_argument("--rule", default="floor", help="of scales (default: floor)")
    args = parser.parse_args()
    names = (args.rows[0], args.rows[1])
    found = [pair for path in args.records for pair in pairs(path, names, args.rule)]
    lines, ratios = [], []
    for pair in found:
        perplexity, left = cells(pair, "nll")
        divergence, of_kl = cells(pair, "kl")
        lines.append([pair.name, *perplexity, *divergence])
        ratios.append((left, of_kl))
    print(f"{names[0]}, then {names[1]}, under {args.rule}\n")
    columns = ["record, outliers", "loss", "loss", "of it", "KL", "KL", "of it"]
    print(table(columns, lines, 1))
    if ratios:
        means = [fmean(each) for each in zip(*ratios, strict=True)]
        print(
            f"\nOn average {means[0]:.2f} of the loss of perplexity and {means[1]:.2f} of the KL."
        )


if __name__ == "__main__":
    main()
