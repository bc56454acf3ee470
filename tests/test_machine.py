"""What is left in a container, from control groups of both versions laid out as files."""

from pathlib import Path

import psutil
import pytest
import torch

from mxtorq.machine import (
    free_device_memory,
    free_disk,
    free_memory,
    resident_memory,
)

MB = 2**20


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with more free memory than any group below."""
    found = psutil.virtual_memory()._replace(available=2**50)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


STAT = f"anon 1\ninactive_file {3 * MB}\nactive_file {2 * MB}\nslab 9\n"
V2 = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": f"{100 * MB}\n",
    "sys/fs/cgroup/memory.current": f"{40 * MB}\n",
    "sys/fs/cgroup/memory.stat": STAT,
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/x\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{200 * MB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{50 * MB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {MB}\ninactive_file {49 * MB}\n",
}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 2**50),
        ({"proc/self/cgroup": "0::/\n"}, 2**50),
        (V2, 65 * MB),
        ({**V2, "sys/fs/cgroup/memory.max": "max\n"}, 2**50),
        ({**V2, "sys/fs/cgroup/memory.current": f"{200 * MB}\n"}, 0),
        (V1, 151 * MB),
        # The host's path is there too, with a limit of its own below the mount's.
        (
            {
                **V1,
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{60 * MB}\n",
                "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": f"{20 * MB}\n",
                "sys/fs/cgroup/memory/docker/abc/memory.stat": "",
            },
            40 * MB,
        ),
        # A group that is not limited, below one that is.
        (
            {
                "proc/self/cgroup": "0::/user/app\n",
                "sys/fs/cgroup/user/app/memory.max": "max\n",
                "sys/fs/cgroup/user/app/memory.current": f"{5 * MB}\n",
                "sys/fs/cgroup/user/app/memory.stat": STAT,
                **{name.replace("cgroup/m", "cgroup/user/m"): V2[name] for name in list(V2)[1:]},
            },
            65 * MB,
        ),
        ({**V2, "sys/fs/cgroup/memory.max": "a lot\n"}, 2**50),
    ],
)
def test_the_tightest_limit_counts(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert free_memory(lay_out(tmp_path, files)) == expected


def test_a_machine_without_groups_has_its_own_figure(tmp_path: Path) -> None:
    tightest = free_memory(lay_out(tmp_path, {**V2, "sys/fs/cgroup/memory.max": f"{41 * MB}\n"}))
    assert tightest == 6 * MB
    assert free_memory() > 0
    assert resident_memory() > 10 * MB


def test_the_disk_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b") > 0
    (tmp_path / "file").write_text("")
    assert free_disk(tmp_path / "file" / "x") > 0


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_what_torch_holds_back_is_free() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    before = free_device_memory(device)
    part = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert free_device_memory(device) <= before - 2**27
    del part
    assert free_device_memory(device) > before - 2**27
