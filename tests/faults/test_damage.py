"""Files that are not as they were written: the right bytes or a clear error, never a wrong result.

Of the model that is read, of an unfinished run between a kill and its resumption, and of a finished
checkpoint.
"""

import json
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mxtorq
from faults.harness import Ended, Run, Server, beside, digest, require_right, wait_until_stopped
from mxtorq.errors import CheckpointError
from mxtorq.export.records import REQUEST


def flip(path: Path, at: float) -> None:
    """One bit of the byte at a fraction of a file."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(at * len(content)))] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_link(path: Path) -> None:
    """To the same bytes, which may change or go any day."""
    away = path.with_name(f"{path.name}.away")
    path.rename(away)
    shutil.move(away, path.parents[2] / away.name)
    path.symlink_to(path.parents[2] / away.name)


# The model that is read.


@pytest.fixture
def model(runs: dict[str, Run], tmp_path: Path) -> Path:
    """A model in two files and an index, to be damaged."""
    folder = Path(shutil.copytree(runs["spilled"].model, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
    table = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def remove(path: Path) -> None:
    path.unlink()


def header_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8 + content[8:].index(b'"dtype"')] ^= 1
    path.write_bytes(content)


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


SOURCE = {
    "truncated": ("model-2.safetensors", truncate),
    "empty": ("model-2.safetensors", empty),
    "header": ("model-1.safetensors", header_flip),
    "long header": ("model-1.safetensors", long_header),
    "no shard": ("model-1.safetensors", remove),
    "no index": ("model.safetensors.index.json", remove),
    "cut index": ("model.safetensors.index.json", truncate),
    "no config": ("config.json", remove),
    "cut config": ("config.json", lambda path: truncate_to(path, 0.9)),
    "cut tokenizer": ("tokenizer.json", lambda path: truncate_to(path, 0.9)),
}


@pytest.mark.parametrize("case", SOURCE)
@pytest.mark.parametrize("name", ["spilled", "rotated"])
def test_a_damaged_model(
    name: str, case: str, server: Server, runs: dict[str, Run], model: Path, tmp_path: Path
) -> None:
    file, damage = SOURCE[case]
    damage(model / file)
    run = Run(**{**vars(runs[name]), "model": model})
    (tmp_path / "made").mkdir()
    ended = server.run(run, tmp_path / "made" / "out")
    assert ended.error == "ModelError", (ended.error, ended.message)
    assert "to do:" in ended.message
    assert beside(tmp_path / "made" / "out") == []


@pytest.mark.parametrize("change", ["replaced", "truncated", "removed"])
def test_a_model_that_changes_under_the_run(
    change: str, server: Server, runs: dict[str, Run], model: Path, tmp_path: Path
) -> None:
    """The second file is not read any more as its header described it."""
    run = Run(**{**vars(runs["spilled"]), "model": model})
    out = tmp_path / "made" / "out"
    out.parent.mkdir()
    right = tmp_path / "right" / "out"
    right.parent.mkdir()
    assert server.run(run, right).error is None
    pid = server.start(run, out, {"kind": "stop", "at": run.events // 4})
    wait_until_stopped(pid)
    path = model / "model-2.safetensors"
    shutil.copy2(path, tmp_path / "kept")
    if change == "replaced":
        tensors = {name: value * 2 for name, value in load_file(path).items()}
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
    elif change == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    os.kill(pid, signal.SIGCONT)
    ended = server.wait(pid)
    assert ended.error == "ModelError", (ended.error, ended.message)
    assert "model-2.safetensors" in ended.message
    if change == "replaced" and (out.parent / "out.partial").exists():
        other = server.run(run, out)  # another model under the same name
        assert other.error == "OutputError"
        assert "a run with weights" in other.message
    path.unlink(missing_ok=True)
    shutil.copy2(tmp_path / "kept", path)
    assert server.run(run, out).error is None
    assert digest(out) == digest(right)


# An unfinished run.


@pytest.fixture(scope="module")
def unfinished(
    server: Server, runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs that were killed with some layers finished, by name."""
    folders = {}
    for name in ("spilled", "rotated"):
        run, room = runs[name], tmp_path_factory.mktemp(name)
        at = run.events // 4
        while not is_between(room / "out.partial", 2 if name == "spilled" else 1):
            shutil.rmtree(room / "out.partial", ignore_errors=True)
            assert server.run(run, room / "out", {"kind": "kill", "at": at}).killed
            at += 3
        folders[name] = room
    return folders


def is_between(partial: Path, layers: int) -> bool:
    """Whether so many layers are finished, and what led to them is gone."""
    states = {path.name[:5] for path in partial.glob("activations/*")}
    return len(list(partial.glob("layers/*.json"))) == layers and states == {f"{layers:05d}"}


def resume(
    name: str,
    damage: Callable[[Path], Any],
    server: Server,
    runs: dict[str, Run],
    unfinished: dict[str, Path],
    tmp_path: Path,
) -> Ended:
    """What comes of a damage. After an error the folder is as it was."""
    room = Path(shutil.copytree(unfinished[name], tmp_path / "room", symlinks=True))
    partial, out = room / "out.partial", room / "out"
    damage(partial)
    listed = sorted(partial.rglob("*"))
    ended = server.run(runs[name], out)
    if ended.error is None:
        assert digest(out) == runs[name].digest
        assert not partial.exists()
        return ended
    assert ended.error in ("CheckpointError", "OutputError"), (ended.error, ended.message)
    assert "to do:" in ended.message
    assert "remove that folder" in ended.message or "move that folder away" in ended.message
    assert not out.exists()
    assert sorted(partial.rglob("*")) == listed
    return ended


REFUSED = {
    "a byte of a layer": lambda p: flip(p / "layers/00000.safetensors", 0.7),
    "the last byte of a layer": lambda p: flip(p / "layers/00000.safetensors", 1),
    "a transform": lambda p: flip(p / "layers/00000-transforms.safetensors", 0.5),
    "an activation": lambda p: flip(activation(p), 0.9),
    "a cut activation": lambda p: truncate(activation(p)),
    "no activation": lambda p: activation(p).unlink(),
    "a record": lambda p: flip_digit(p / "layers/00000.json", "output_error"),
    "a hash": lambda p: flip_digit(p / "layers/00001.json", "sha256"),
    "a cut record": lambda p: truncate_to(p / "layers/00001.json", 0.5),
    "an empty record": lambda p: empty(p / "layers/00000.json"),
    "a record twice": lambda p: shutil.copy(p / "layers/00000.json", p / "layers/00001.json"),
    "one record too many": lambda p: shutil.copy(p / "layers/00001.json", p / "layers/00002.json"),
    "the last record away": lambda p: (p / "layers/00001.json").unlink(),
    "no layer": lambda p: (p / "layers/00001.safetensors").unlink(),
    "a link to a layer": lambda p: to_link(p / "layers/00001.safetensors"),
    "a link to an activation": lambda p: to_link(activation(p)),
    "a folder for a layer": lambda p: to_folder(p / "layers/00001.safetensors"),
    "a folder for a record": lambda p: to_folder(p / "layers/00001.json"),
    "a request that is cut": lambda p: truncate_to(p / REQUEST, 0.5),
    "another request": lambda p: flip_digit(p / REQUEST, "calibration_tokens"),
    "a folder for the request": lambda p: to_folder(p / REQUEST),
    "no request": lambda p: (p / REQUEST).unlink(),
    "no layers": lambda p: move_away(p / "layers"),
}
"""Damages of which nothing good can come."""

HARMLESS = {
    "what a write left": lambda p: (p / "layers/.00002.safetensors.writing").write_bytes(b"x" * 9),
    "files of a layer that is not finished": lambda p: [
        (p / name).write_bytes(b"junk")
        for name in ("layers/00002.safetensors", "activations/00003-00000.safetensors")
    ],
    "strange folders": lambda p: [
        (p / name).mkdir()
        for name in ("layers/other", "activations/.x", "checkpoint", "checkpoint/config.json")
    ],
    "a file for the checkpoint": lambda p: (p / "checkpoint").write_bytes(b"x"),
    "the first record away": lambda p: (p / "layers/00000.json").unlink(),
}
"""Damages that the next process gets over."""


def activation(partial: Path) -> Path:
    return sorted((partial / "activations").iterdir())[0]


def truncate_to(path: Path, part: float) -> None:
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def flip_digit(path: Path, field: str) -> None:
    """Another digit in the value of a field, by one bit; it stays JSON of the same types."""
    content = bytearray(path.read_bytes())
    at = content.index(f'"{field}"'.encode()) + len(field) + 3
    while not chr(content[at]).isdigit():
        at += 1
    content[at] ^= 1
    path.write_bytes(content)
    json.loads(content)


def move_away(path: Path) -> None:
    path.rename(path.parents[1] / "away")
    path.symlink_to(path.parents[1] / "away")


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_unfinished_run(
    case: str,
    server: Server,
    runs: dict[str, Run],
    unfinished: dict[str, Path],
    tmp_path: Path,
) -> None:
    ended = resume("spilled", REFUSED[case], server, runs, unfinished, tmp_path)
    assert ended.error is not None


@pytest.mark.parametrize("case", HARMLESS)
def test_damage_that_does_not_matter(
    case: str,
    server: Server,
    runs: dict[str, Run],
    unfinished: dict[str, Path],
    tmp_path: Path,
) -> None:
    ended = resume("spilled", HARMLESS[case], server, runs, unfinished, tmp_path)
    assert ended.error is None, ended.message


@pytest.mark.parametrize("file", ["rotations.safetensors", "rotations.json"])
def test_damaged_rotations(
    file: str, server: Server, runs: dict[str, Run], unfinished: dict[str, Path], tmp_path: Path
) -> None:
    ended = resume("rotated", lambda p: flip(p / file, 0.6), server, runs, unfinished, tmp_path)
    assert ended.error == "CheckpointError"


def test_rotations_that_are_lost_are_chosen_again(
    server: Server, runs: dict[str, Run], unfinished: dict[str, Path], tmp_path: Path
) -> None:
    def lose(partial: Path) -> None:
        (partial / "rotations.json").unlink()

    ended = resume("rotated", lose, server, runs, unfinished, tmp_path)
    assert ended.error is None, ended.message


def test_activations_that_change_under_the_run(
    server: Server, runs: dict[str, Run], tmp_path: Path
) -> None:
    """Spilled states are hashed when they are read first."""
    run, out = runs["spilled"], tmp_path / "out"
    pid = server.start(run, out, {"kind": "stop", "at": stop_in_layer(run, server, tmp_path)})
    wait_until_stopped(pid)
    flip(activation(tmp_path / "out.partial"), 0.9)
    os.kill(pid, signal.SIGCONT)
    ended = server.wait(pid)
    assert ended.error == "CheckpointError", (ended.error, ended.message)
    assert "with other bytes than were written" in ended.message


def stop_in_layer(run: Run, server: Server, tmp_path: Path) -> int:
    """The event that ends the first layer: the removal of what led to it."""
    kinds = server.run(run, tmp_path / "counted" / "out", {"kind": "count"}).kinds
    return kinds.index("unlink") + 1


# A finished checkpoint.


@pytest.mark.parametrize("name", ["kept", "spilled", "rotated"])
def test_a_flipped_byte_of_a_checkpoint(
    name: str, server: Server, runs: dict[str, Run], tmp_path: Path
) -> None:
    """Any file, anywhere. The manifest has no hash of its own: there the model must be the same."""
    run, out = runs[name], tmp_path / "out"
    assert server.run(run, out).error is None
    right = mxtorq.load(out, device="cpu").state_dict()
    assert digest(out) == run.digest
    for path in sorted(out.iterdir()):
        honest = path.read_bytes()
        for at in (0, 0.1, 0.37, 0.62, 0.93, 1):
            flip(path, at)
            if path.name != "mxtorq.json":
                with pytest.raises(CheckpointError, match=path.name):
                    mxtorq.load(out, device="cpu")
            else:
                same_or_refused(out, right)
            path.write_bytes(honest)
        for cut in (b"", honest[: len(honest) // 2], honest[:-1], honest + b"\0"):
            path.write_bytes(cut)
            if path.name == "mxtorq.json" and cut == honest[:-1]:
                same_or_refused(out, right)  # a newline less
            else:
                with pytest.raises(CheckpointError):
                    mxtorq.load(out, device="cpu")
        path.unlink()
        with pytest.raises(CheckpointError):
            mxtorq.load(out, device="cpu")
        path.write_bytes(honest)
    require_right(out, run)


def same_or_refused(out: Path, right: dict[str, torch.Tensor]) -> None:
    try:
        found = mxtorq.load(out, device="cpu").state_dict()
    except CheckpointError:
        return
    assert set(found) == set(right)
    assert all(torch.equal(found[name], value) for name, value in right.items())
