"""Files that a power cut leaves whole or absent, and that the safetensors library reads."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mxtorq.errors import CheckpointError
from mxtorq.reading.documents import Refusal
from mxtorq.reading.headers import DTYPES, read_header
from mxtorq.writing import fingerprint, join_files, sync, write_tensors, write_text, written

REFUSE = Refusal(kind=CheckpointError, asked="a file", why="it is odd", todo="get another one")


def every_dtype() -> dict[str, torch.Tensor]:
    """Odd lengths of every type, so that nothing is aligned by accident."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        values = torch.randint(0, 2, (3, 5), generator=draw, dtype=torch.uint8)
        tensors[name] = (values.bool() if dtype == torch.bool else values.float().to(dtype))[:, 1:4]
    return tensors


ODD = {
    "ünïcode.重み": torch.arange(3),
    'quote".\\back\n': torch.ones(2, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "empty wide": torch.zeros(3, 0, dtype=torch.float64),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "parameter": torch.nn.Parameter(torch.ones(3)),
}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> list[int]:
        flat = tensor.detach().contiguous().flatten()
        return flat.view(torch.uint8).tolist() if len(flat) else []

    return (one.dtype, one.shape, raw(one)) == (other.dtype, other.shape, raw(other))


@pytest.mark.parametrize("tensors", [every_dtype(), ODD, {}], ids=["dtypes", "odd", "none"])
def test_the_library_reads_what_is_written(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "file.safetensors"
    facts = write_tensors(path, tensors)
    content = path.read_bytes()
    assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert facts == fingerprint(path)
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(same_bits(found[name], value) for name, value in tensors.items())


def test_every_tensor_begins_aligned(tmp_path: Path) -> None:
    tensors = {**every_dtype(), **ODD}
    for count in range(1, len(tensors)):  # headers of many lengths
        path = tmp_path / "file.safetensors"
        write_tensors(path, dict(list(tensors.items())[:count]))
        entries, _ = read_header(path, REFUSE)
        assert len(entries) == count
        for name, entry in entries.items():
            assert entry.start % entry.dtype.itemsize == 0, name


def test_the_bytes_depend_on_names_and_values_alone(tmp_path: Path) -> None:
    tensors = {**every_dtype(), **ODD}
    backwards = {name: tensors[name].clone() for name in reversed(tensors)}
    (tmp_path / "else").mkdir()
    one = write_tensors(tmp_path / "a", tensors)
    assert write_tensors(tmp_path / "else" / "b", backwards) == one
    (tmp_path / "a").unlink()
    changed = {**tensors, "scalar": torch.tensor(2.25, dtype=torch.float64)}
    assert write_tensors(tmp_path / "a", changed) != one


def test_large_tensors_go_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_tensors(tmp_path / "whole", ODD)
    monkeypatch.setattr("mxtorq.writing._PIECE", 5)
    assert write_tensors(tmp_path / "pieces", ODD) == whole
    entries, _ = read_header(tmp_path / "whole", REFUSE)
    assert join_files(tmp_path / "joined", entries) == whole


def test_joined_files_are_the_file_of_all(tmp_path: Path) -> None:
    tensors = {**every_dtype(), **ODD}
    entries: dict[str, Any] = {}
    for number, (name, value) in enumerate(tensors.items()):
        write_tensors(tmp_path / str(number), {name: value})
        entries |= read_header(tmp_path / str(number), REFUSE)[0]
    joined = join_files(tmp_path / "joined", entries)
    assert joined == write_tensors(tmp_path / "whole", tensors) == fingerprint(tmp_path / "joined")


def test_a_piece_that_ends_early_is_an_error(tmp_path: Path) -> None:
    write_tensors(tmp_path / "piece", {"w": torch.arange(99)})
    entries, _ = read_header(tmp_path / "piece", REFUSE)
    os.truncate(tmp_path / "piece", 200)
    with pytest.raises(OSError, match="shorter than its header says"):
        join_files(tmp_path / "joined", entries)
    assert [path.name for path in tmp_path.iterdir()] == ["piece"]


def test_text(tmp_path: Path) -> None:
    facts = write_text(tmp_path / "text", "é\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\n"
    assert facts == fingerprint(tmp_path / "text")


class Trace:
    """The system calls that decide what a power cut leaves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self._traced(name, getattr(os, name), fails == name))

    def _traced(self, name: str, real: Any, fails: bool) -> Any:
        def call(first: Any, *others: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else str(others[0])
            self.calls.append((name, Path(path).name))
            if fails:
                raise OSError(errno.EIO, "Input/output error")
            return real(first, *others)

        return call


def test_the_bytes_come_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(monkeypatch)
    write_text(tmp_path / "text", "x")
    assert trace.calls == [
        ("fsync", ".text.writing"),
        ("replace", "text"),
        ("fsync", tmp_path.name),
    ]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "text", "old")
    Trace(monkeypatch, fails)
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "text", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert (tmp_path / "text").read_text() == "old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_ends_early_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), written(tmp_path / "file") as file:
        file.write(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".text.writing").write_bytes(b"a longer text of an earlier process")
    write_text(tmp_path / "text", "x")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"text": "x"}


def test_folders_are_synced_too(tmp_path: Path) -> None:
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")
