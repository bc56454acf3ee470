"""What every benchmark writes down beside its figures: the machine, the versions, a table.

A figure without the CPU, the versions and the command that made it says nothing to the next reader.
This file loads neither torch nor mxtorq: a process that measures the memory of its children must
stay small itself, since Linux lets a child's peak start at its parent's.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor's own name for itself, as far as the operating system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def provenance(packages: Iterable[str]) -> dict[str, Any]:
    """What a reader needs to repeat a run: command, time, machine, versions."""
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(packages),
    }


def heading(record: dict[str, Any]) -> str:
    """The provenance in two lines."""
    packages = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    machine = f"{record['cpu']}, {record['logical_cpus']} logical CPUs, {record['system']}"
    return f"`{record['command']}`\n{machine}; {packages}."


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """A Markdown table that is aligned for a terminal too; the first ``texts`` columns hold text,
    the others numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if index < texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * w if i < texts else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The two options that every benchmark has."""
    parser.add_argument("--json", type=_new_file, metavar="PATH", help="write all figures here")
    parser.add_argument("--markdown", type=_new_file, metavar="PATH", help="write the tables here")


def write(args: argparse.Namespace, record: dict[str, Any], text: str) -> None:
    """Print the tables, and write the files that were asked for."""
    print(text)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # before minutes of measuring, not after
        raise argparse.ArgumentTypeError(f"{path} is a folder, or its folder does not exist")
    return path
