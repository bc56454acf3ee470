"""Folders appear whole or not at all, and are read with suspicion."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxtorq.errors import OutputError
from mxtorq.export.checkpoint import TensorWriter, output_folder, require_absent


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "out"
    with output_folder(out) as folder:
        (folder / "file").write_text("content")
        assert not out.exists()
        assert folder.parent == out.parent
    assert listing(out) == ["file"]
    assert listing(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(error), output_folder(out) as folder:
        (folder / "file").write_text("content")
        raise error
    assert listing(tmp_path) == []


def test_an_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    for name, make in (("folder", Path.mkdir), ("file", Path.touch)):
        make(tmp_path / name)
        with pytest.raises(OutputError, match="nothing is overwritten"):
            require_absent(tmp_path / name)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OutputError):
        require_absent(tmp_path / "link")
    with pytest.raises(OutputError, match="no folder that you may write to"):
        require_absent(tmp_path / "file" / "below")


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError), output_folder(out):
        out.mkdir()
        (out / "theirs").touch()
    assert listing(out) == ["theirs"]
    assert listing(tmp_path) == ["out"]


def test_a_disk_without_room_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="MB free"), output_folder(tmp_path / "out") as folder:
        TensorWriter(folder).add({"w": torch.zeros(1000)})
    assert listing(tmp_path) == []


def test_a_write_that_the_system_stops_leaves_nothing(tmp_path: Path) -> None:
    """A real failure in the middle of a file: the process may not write more than 100 kB."""
    code = """
import sys, torch
from pathlib import Path
from mxtorq.export.checkpoint import TensorWriter, output_folder
from mxtorq.errors import OutputError
try:
    with output_folder(Path(sys.argv[1])) as folder:
        TensorWriter(folder).add({"w": torch.zeros(1_000_000)})
except OutputError as error:
    print("refused:", error.found)
"""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error code instead of a signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert "refused:" in done.stdout, done.stderr
    assert listing(tmp_path) == []
