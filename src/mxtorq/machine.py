"""What this machine has left, for a process that may live in a container.

A container is given less than the machine has, and what psutil reads are the machine's figures.
The limit stands in the control group of the process or in one above it: ``memory.max`` in version 2
of that interface, ``memory.limit_in_bytes`` in version 1. What a group uses includes the cache of
files, which the kernel gives back when memory is asked for, so it counts as free here as it does in
psutil's figure.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_FILES = {
    "": ("memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}
"""By controller in /proc/self/cgroup (version 2 has none there): limit, usage, cache of files."""


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may still take.

    Args:
        root: of the file system that says so.
    """
    return min([int(psutil.virtual_memory().available), *_left_in_groups(root)])


def resident_memory() -> int:
    """Bytes of memory that this process has."""
    return int(psutil.Process().memory_info().rss)


def free_device_memory(device: torch.device) -> int:
    """Bytes that this process may still take on an accelerator, what torch holds back included."""
    free, _ = torch.accelerator.get_memory_info(device)
    idle = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(free + idle)


def free_disk(path: Path) -> int:
    """Bytes that may still be written where a path is or will be."""
    existing = next(each for each in (path, *path.absolute().parents) if each.is_dir())
    return shutil.disk_usage(existing).free


def _left_in_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        name = "memory" if "memory" in controllers.split(",") else controllers
        if name in _FILES:
            # Inside of a container the path may be the host's: then only the mount itself is there.
            mount = root / "sys/fs/cgroup" / name
            here = mount / path.lstrip("/")
            for folder in (here, *here.parents):
                if folder.is_relative_to(mount):
                    yield from _left(folder, *_FILES[name])


def _left(folder: Path, limit: str, usage: str, cached: tuple[str, ...]) -> Iterator[int]:
    try:
        text = (folder / limit).read_text().strip()
        most = None if text == "max" else int(text)
        used = int((folder / usage).read_text())
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = sum(int(value) for key, value in pairs if key in cached)
    except (OSError, ValueError):  # no limit here
        return
    if most is not None:
        yield max(0, most - max(0, used - cache))
