"""Everything about speed on a CPU in one run: one JSON, one Markdown table, and what is aimed at.

    python benchmarks/bench.py --json docs/results/bench.json --markdown docs/results/bench.md

The parts are the other benchmarks of this folder, which say what each of them measures and can be
run alone: `throughput` (beside other libraries), `limits` (beside copying and matrix products),
`searches`, `gptq`, `layer` (a decoder layer of Llama-3-8B, and a linear), and `quantize_reference`
(whole models). Everything runs on one thread and in turns with what it is compared with.

An aim is a ratio within this run, or a time for a search that has no partner; what misses it says
so. On a busy machine ratios of short calls still mean something, ratios to memory less.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gptq
import layer
import limits
import quantize_reference
import searches
import throughput
from libraries import installed_peers
from record import add_outputs, heading, provenance, table, write

SHAPE = [4096, 4096]
PACKAGES = (
    *("mxtorq", "torch", "transformers", "numpy", "numba"),
    *("torchao", "compressed-tensors", "ml_dtypes"),
)
PEERS = ("torchao", "compressed-tensors")
"""The libraries that the aim of rounding speaks of."""

Row = dict[str, Any]


def formats(rounds: int) -> list[Row]:
    """Beside other libraries; the ratio is their time over mxtorq's."""
    found, not_timed = throughput.measure(installed_peers(), SHAPE, rounds, 0, 0)
    for line in not_timed:
        print(f"Not timed, not the same work: {line}", file=sys.stderr)
    return [
        {
            "operation": row.operation,
            "what": f"{row.dtype}, {row.scale_rule}",
            "by": row.library,
            "milliseconds": row.cpu_ms,
            "ratio": row.ratio,
            "ratio_is": "time / mxtorq",
        }
        for row in found
    ]


def machine(rounds: int) -> list[Row]:
    """Beside the machine; the ratio is the part of the limit."""
    return [
        {
            "operation": row["operation"],
            "what": row["dtype"],
            "by": f"mxtorq, {row['backend']}",
            "milliseconds": row["milliseconds"],
            "ratio": row["ratio"],
            "ratio_is": f"of {row['limit']} ({row['limit_rate']:.3g} G/s)",
        }
        for row in limits.measure(SHAPE, rounds, 0, time.process_time)
    ]


def fits(rounds: int) -> list[Row]:
    """Searches; the ratio is the speed over the first of the group."""
    return [
        {
            "operation": row["operation"],
            "what": row["shape"],
            "by": row["backend"],
            "milliseconds": row["milliseconds"],
            "ratio": row["ratio"],
            "ratio_is": "times as fast as the first",
        }
        for row in searches.measure(rounds, 0)
    ]


def compensation(rounds: int) -> list[Row]:
    """GPTQ; the ratio is the other way's time over the stage's."""
    rows = []
    for stage in gptq.measure(rounds, 0, SHAPE[1]):
        shape = " x ".join(map(str, stage["shape"]))
        for by, seconds in (("mxtorq", stage["seconds"]), (stage["other"], stage["other_seconds"])):
            if by is not None:
                rows.append(
                    {
                        "operation": f"GPTQ: {stage['stage']}",
                        "what": shape,
                        "by": by,
                        "milliseconds": 1e3 * seconds,
                        "ratio": 1.0 if by == "mxtorq" else stage["ratio"],
                        "ratio_is": "time / mxtorq",
                    }
                )
    return rows


def forward(rounds: int) -> list[Row]:
    """A decoder layer in both dtypes, and a linear; the ratio is time over the first."""
    import torch

    # A layer in bfloat16 takes minutes on a CPU without instructions for it: one turn.
    found = layer.measure_layer(torch.float32, 2048, rounds)
    found += layer.measure_layer(torch.bfloat16, 2048, 1, ("hadamard", "torq"))
    found += layer.measure_linear(rounds, 0)
    return [
        {
            "operation": row["operation"],
            "what": f"{row['shape']}, {row['dtype']}",
            "by": row["by"],
            "milliseconds": row["milliseconds"],
            "ratio": row["ratio"],
            "ratio_is": "time / first",
        }
        for row in found
    ]


def whole(rounds: int) -> list[Row]:
    """Quantizing the model in the package, process by process; the ratio is to identity."""
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        for method in quantize_reference.METHODS:
            task = quantize_reference.Task(
                model="reference",
                method=method,
                calibration=None,
                calibration_tokens=None,
                threads=1,
                out=Path(scratch) / method,
            )
            runs[method] = quantize_reference.run_fresh(task)
    first = runs[quantize_reference.METHODS[0]].cpu_seconds
    return [
        {
            "operation": "quantize a model",
            "what": f"reference, {run.calibration['tokens']} tokens",
            "by": f"{method}, rtn",
            "milliseconds": 1e3 * run.cpu_seconds,
            "ratio": run.cpu_seconds / first,
            "ratio_is": "time / first",
        }
        for method, run in runs.items()
    ]


PARTS: dict[str, Callable[[int], list[Row]]] = {
    "formats": formats,
    "limits": machine,
    "searches": fits,
    "gptq": compensation,
    "layer": forward,
    "model": whole,
}


def aims(parts: dict[str, list[Row]]) -> list[tuple[str, str, str, bool]]:
    """(what, found, aim, met) of everything that was measured."""
    found: list[tuple[str, str, str, bool]] = []

    def least(name: str, rows: list[Row], aim: float, show: Callable[[float], str]) -> None:
        if rows:
            worst = min(row["ratio"] for row in rows)
            found.append((name, show(worst), f"at least {show(aim)}", worst >= aim))

    def most(name: str, values: list[float], aim: float, show: Callable[[float], str]) -> None:
        if values:
            worst = max(values)
            found.append((name, show(worst), f"at most {show(aim)}", worst <= aim))

    def times(value: float) -> str:
        return f"{value:.0f} times"

    def percent(value: float) -> str:
        return f"{100 * value:.0f} %"

    def milliseconds(value: float) -> str:
        return f"{value:.0f} ms"

    for operation in ("quantize", "fake_quantize"):
        rows = [
            row
            for row in parts.get("formats", [])
            if row["operation"] == operation and row["by"] in PEERS
        ]
        least(f"{operation}: the fastest of {', '.join(PEERS)}", rows, 25, times)
    fast = [row for row in parts.get("limits", []) if not row["by"].endswith("eager")]
    for operation in ("fake_quantize", "dequantize"):
        rows = [row for row in fast if row["operation"] == operation]
        least(f"{operation}: of the copy bandwidth", rows, 0.5, percent)
    rows = [row for row in fast if row["operation"] == "rotate + quantize" and "one" in row["what"]]
    least("rotate + quantize, one 32 x 32 matrix: of the FP32 GEMM peak", rows, 0.5, percent)
    best = {(row["operation"], row["what"]): row for row in parts.get("searches", [])}  # the last
    for name, aim in (("Schur-Horn", 60), ("R_intra", 2000), ("greedy, 256 steps", 1000)):
        chosen = [
            row["milliseconds"]
            for (operation, what), row in best.items()
            if operation == name and (name[0] == "R" or "864" in what or "outliers" in what)
        ]
        most(f"{name}: the hardest of its kind", chosen, aim, milliseconds)
    stages = {
        row["operation"].split(",")[0]: row["milliseconds"]
        for row in parts.get("gptq", [])
        if row["by"] == "mxtorq"
    }
    if stages:
        part = stages["GPTQ: group steps"] / stages["GPTQ: round"]
        most("GPTQ: the inner loop's part of the whole", [part], 1 / 3, percent)
    for dtype in ("float32", "bfloat16"):
        costs = [
            row["ratio"] - 1
            for row in parts.get("layer", [])
            if row["what"].endswith(f"tokens, {dtype}")
            and row["operation"] == "layer"
            and row["by"] in layer.TRANSFORMS
        ]
        most(f"layer of Llama-3-8B, {dtype}: added online", costs, 0.1, percent)
    return found


def main() -> None:
    """Run the parts, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each group")
    add_outputs(parser)
    args = parser.parse_args()
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown or args.rounds < 1:
        parser.error(f"--parts are of {', '.join(PARTS)}, and --rounds is positive")

    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    parts: dict[str, list[Row]] = {}
    for name in args.parts.split(","):
        started = time.perf_counter()
        # Searches and stages of seconds need fewer turns than calls of milliseconds.
        parts[name] = PARTS[name](
            args.rounds if name in ("formats", "limits") else min(args.rounds, 3)
        )
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        if args.json:  # what is measured is not lost when a later part fails
            args.json.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    reached = aims(parts)
    record = {
        "schema": "mxtorq.benchmarks.bench",
        "version": 1,
        **provenance(PACKAGES),
        "shape": SHAPE,
        "threads": 1,
        "rounds": args.rounds,
        "aims": [dict(zip(("what", "found", "aim", "met"), aim, strict=True)) for aim in reached],
        "parts": parts,
    }
    lines = [
        [
            *(row["operation"], row["what"], row["by"], row["ratio_is"]),
            f"{row['milliseconds']:.4g}",
            f"{row['ratio']:.3g}",
        ]
        for rows in parts.values()
        for row in rows
    ]
    columns = ["operation", "what", "by", "the ratio is", "ms", "ratio"]
    text = [
        heading(record),
        f"Tensors {SHAPE} unless a row says otherwise, one thread, medians of CPU time. "
        "Results were compared bit for bit first, where "
        "a bit is promised.",
        "\n".join(
            f"- {what}: {found} (aim: {aim}{'' if met else '; MISSED'})."
            for what, found, aim, met in reached
        ),
        table(columns, lines, 4),
    ]
    write(args, record, "\n\n".join(filter(None, text)))


if __name__ == "__main__":
    main()
