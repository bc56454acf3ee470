"""What quantizing a whole model costs: seconds, memory and bytes on disk, method by method.

    python benchmarks/quantize_reference.py --model reference --rounds 3 --json out.json

Every run is `mxtorq.pipeline.quantize` from nothing to a checkpoint that was read back and
compared, in a fresh process, so that no run warms up another; methods take turns, A B C A B C. A
process reports its peak resident memory twice: after the imports, which are most of it for a small
model, and at the end. The seconds do not contain the imports.
"""

import argparse
import importlib.util
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from record import add_outputs, heading, provenance, table, write

METHODS = ("identity", "hadamard", "torq")
PACKAGES = ("mxtorq", "torch", "transformers", "tokenizers", "safetensors", "numpy")
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run: what a fresh process needs to know."""

    model: str
    method: str
    calibration: str | None
    calibration_tokens: int | None
    threads: int | None
    out: Path


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run cost."""

    method: str
    seconds: float
    """Wall seconds of `pipeline.quantize`."""
    cpu_seconds: float
    """CPU seconds of the same, all threads together."""
    stage_seconds: dict[str, float]
    """Wall seconds of each stage that the pipeline announces, and of ``load`` before them."""
    import_seconds: float
    imports_bytes: int
    """Peak resident memory when everything was imported and nothing was loaded."""
    peak_bytes: int
    """Peak resident memory at the end."""
    checkpoint_bytes: int
    threads: int
    calibration: dict[str, Any]


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def run(task: Task) -> Run:
    """Quantize once, in a process that has imported nothing yet."""
    started = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  loads lazily

    from mxtorq import MxtorqError, pipeline
    from mxtorq.config import Recipe, parse_method

    import_seconds, imports_bytes = time.perf_counter() - started, peak_bytes()
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    chosen = {"calibration": task.calibration, "calibration_tokens": task.calibration_tokens}
    given: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
    cpu_started, started = time.process_time(), time.perf_counter()
    stages = [("load", started)]

    def progress(stage: str, done: int, total: int) -> None:
        if stage != stages[-1][0]:
            stages.append((stage, time.perf_counter()))

    try:
        recipe = Recipe(method=parse_method(task.method), **given)
        manifest = pipeline.quantize(task.model, task.out, recipe, device="cpu", progress=progress)
    except MxtorqError as error:
        raise RuntimeError(str(error)) from None  # one that can travel between processes
    ended = time.perf_counter()
    ends = [begin for _, begin in stages[1:]] + [ended]
    return Run(
        method=task.method,
        seconds=ended - started,
        cpu_seconds=time.process_time() - cpu_started,
        stage_seconds={
            stage: end - begin for (stage, begin), end in zip(stages, ends, strict=True)
        },
        import_seconds=import_seconds,
        imports_bytes=imports_bytes,
        peak_bytes=peak_bytes(),
        checkpoint_bytes=sum(f.stat().st_size for f in task.out.rglob("*") if f.is_file()),
        threads=torch.get_num_threads(),
        calibration=manifest.calibration,
    )


def run_fresh(task: Task) -> Run:
    """The same in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, task).result()


def summary(runs: list[Run]) -> dict[str, Any]:
    """The medians of one method's runs."""
    first = runs[0]
    middle = {
        name: statistics.median(getattr(each, name) for each in runs)
        for name in ("seconds", "cpu_seconds", "import_seconds", "imports_bytes", "peak_bytes")
    }
    stages = {
        stage: statistics.median(each.stage_seconds[stage] for each in runs)
        for stage in first.stage_seconds
    }
    return {
        "method": first.method,
        **middle,
        "stage_seconds": stages,
        "checkpoint_bytes": first.checkpoint_bytes,
    }


def report(record: dict[str, Any]) -> str:
    """Everything as text."""
    rows, calibration = record["rows"], record["calibration"]
    stages = list(rows[0]["stage_seconds"])
    columns = ["method", "seconds", "CPU s", f"CPU s / {rows[0]['method']}", *stages]
    columns += ["peak MiB", "after imports", "difference", "checkpoint MB"]
    lines = []
    for row in rows:
        peak, imports = row["peak_bytes"] / MIB, row["imports_bytes"] / MIB
        lines.append(
            [
                row["method"],
                f"{row['seconds']:.2f}",
                f"{row['cpu_seconds']:.2f}",
                f"{row['cpu_seconds'] / rows[0]['cpu_seconds']:.2f}",
                *(f"{row['stage_seconds'][stage]:.2f}" for stage in stages),
                *(f"{peak:.0f}", f"{imports:.0f}", f"{peak - imports:.0f}"),
                f"{row['checkpoint_bytes'] / 1e6:.2f}",
            ]
        )
    return "\n\n".join(
        [
            heading(record),
            f"Model {record['model']!r}, calibrated on {calibration['tokens']:,} tokens in windows "
            f"of {calibration['seqlen']}, {record['threads']} thread(s), medians of "
            f"{record['rounds']} run(s), each in a process of its own. Seconds are wall seconds, "
            "in all and by stage, unless they are called CPU.",
            table(columns, lines, 1),
        ]
    )


def main() -> None:
    """Run every method, in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="reference", help="a folder, a hub id, or: reference")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    parser.add_argument("--calibration", help="as in `mxtorq quantize`")
    parser.add_argument("--calibration-tokens", type=int, help="as in `mxtorq quantize`")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=1, help="of each method; shows medians")
    add_outputs(parser)
    args = parser.parse_args()
    if min(args.rounds, args.threads or 1) < 1:
        parser.error("--rounds and --threads are positive")
    methods = args.methods.split(",")
    if importlib.util.find_spec("mxtorq") is None:
        sys.exit("mxtorq is not installed here: python -m pip install --editable .")

    runs: dict[str, list[Run]] = {method: [] for method in methods}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(args.rounds):
            for number, method in enumerate(methods):
                print(f"run {turn + 1} of {args.rounds}: {method}", file=sys.stderr)
                task = Task(
                    model=args.model,
                    method=method,
                    calibration=args.calibration,
                    calibration_tokens=args.calibration_tokens,
                    threads=args.threads,
                    out=Path(scratch) / f"{turn}-{number}",
                )
                try:
                    runs[method].append(run_fresh(task))
                except RuntimeError as error:
                    sys.exit(str(error))
    first = runs[methods[0]][0]
    record = {
        "schema": "mxtorq.benchmarks.quantize_reference",
        "version": 1,
        **provenance(PACKAGES),
        "model": args.model,
        "calibration": first.calibration,
        "threads": first.threads,
        "rounds": args.rounds,
        "rows": [summary(each) for each in runs.values()],
        "runs": [asdict(each) for method in methods for each in runs[method]],
    }
    write(args, record, report(record))


if __name__ == "__main__":
    main()
