"""A run may end at any moment: what is finished stays, what is not leaves no trace.

How whole runs bear it is told in `tests/faults`; here stands what the parts promise.
"""

import copy
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from fuzz.test_fuzz_readers import bounded, damaged, fuzz, odd, only_ours, texts
from mxtorq.errors import CheckpointError, MxtorqError, OutputError, VerificationError
from mxtorq.export.manifest import FILE, SiteEntry
from mxtorq.export.output import (
    alone,
    finished_layers,
    lock_file,
    log_file,
    partial_folder,
    require_absent,
)
from mxtorq.export.records import REQUEST, seal_of
from mxtorq.export.unfinished import Unfinished, require_free, unfinished
from mxtorq.transforms.base import OfflineRotations
from mxtorq.transforms.kronecker import KroneckerRotation
from mxtorq.writing import write_tensors, write_text

REQUEST_OF = {"model": "m", "recipe": {"seed": 0, "method": {"name": "torq"}}, "tokens": (1, 2)}


ROTATION = KroneckerRotation(
    torch.tensor([1, -1, 1, 1, -1, 1], dtype=torch.float64),
    (
        torch.eye(3, dtype=torch.float64),
        torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64),
    ),
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def finish_layer(run: Unfinished, states: int = 2) -> None:
    """Another finished layer, with activations behind it."""
    index = run.finished
    site = SiteEntry(
        site=f"layers.{index}.qkv_in",
        linears=["q"],
        width=32,
        kind="hadamard",
        multiply_adds=1,
        extra_bytes=0,
        output_error=0.1 + index,
    )
    facts = {}
    for number in range(states):
        path = run.activations / f"{index + 1:05d}-{number:05d}.safetensors"
        facts[path.name] = write_tensors(path, {"hidden": torch.full((3,), float(number))})
    tensors = {f"layers.{index}.w": torch.arange(index + 4)}
    run.add_layer(tensors, {}, [site], [f"layers.{index}.kept"], facts)


def make_checkpoint(run: Unfinished) -> None:
    with run.checkpoint() as folder:
        for number, path in enumerate(run.pieces()):
            shutil.copy(path, folder / f"{number}.safetensors")
        write_text(folder / FILE, "{}")


def test_the_folder_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "out"
    with unfinished(out, REQUEST_OF) as run:
        finish_layer(run)
        with run.checkpoint() as folder:
            (folder / FILE).write_text("content")
            assert not out.exists()
        assert listing(out) == [FILE]
    assert listing(out) == [FILE]
    assert listing(out.parent) == ["out", "out.log"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_before_the_first_layer_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(error), unfinished(out, REQUEST_OF):
        raise error
    assert listing(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_later_keeps_what_is_finished(
    tmp_path: Path, error: type[BaseException]
) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(error), unfinished(out, REQUEST_OF) as run:
        finish_layer(run)
        finish_layer(run)
        (run.folder / "layers" / "00002.safetensors").touch()
        raise error
    assert listing(out.parent) == ["out.log", "out.partial"]
    assert finished_layers(out) == 2
    assert error.__name__ in log_file(out).read_text()
    with unfinished(out, json.loads(json.dumps(REQUEST_OF))) as run:
        assert [each.sites[0].output_error for each in run.layers] == [0.1, 1.1]
        assert run.layers[1].kept == ["layers.1.kept"]
        assert listing(run.activations) == [f"00002-0000{n}.safetensors" for n in range(2)]
        assert [path.name for path in run.pieces()] == ["00000.safetensors", "00001.safetensors"]
        assert run.pieces("-transforms.safetensors") == []
        assert "00002.safetensors" not in listing(run.folder / "layers")
        make_checkpoint(run)
    assert listing(out) == ["0.safetensors", "1.safetensors", FILE]
    assert finished_layers(out) == 0


def test_what_was_found_to_be_wrong_goes(tmp_path: Path) -> None:
    with pytest.raises(VerificationError), unfinished(tmp_path / "out", REQUEST_OF) as run:
        finish_layer(run)
        raise VerificationError(asked="", found="a difference", why="", todo="")
    assert listing(tmp_path) == ["out.log"]
    assert "a difference" in log_file(tmp_path / "out").read_text()


def test_an_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    for name, make in (("folder", Path.mkdir), ("file", Path.touch)):
        make(tmp_path / name)
        for check in (require_absent, require_free):
            with pytest.raises(OutputError, match="nothing is overwritten"):
                check(tmp_path / name)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OutputError):
        require_absent(tmp_path / "link")
    with pytest.raises(OutputError, match="no folder that you may write to"):
        require_absent(tmp_path / "file" / "below")
    assert listing(tmp_path) == ["file", "folder", "link"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = pytest.raises(OutputError, match="nothing is overwritten")
    with refused, unfinished(out, REQUEST_OF) as run:
        finish_layer(run)
        with run.checkpoint() as folder:
            (folder / FILE).touch()
            out.mkdir()
            (out / "theirs").touch()
    assert listing(out) == ["theirs"]
    assert listing(tmp_path) == ["out", "out.log", "out.partial"]


def test_a_disk_without_room_is_told_with_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layers, kept in ((0, "nothing is kept"), (2, "2 finished layers are kept")):
        with pytest.raises(OutputError, match=kept), unfinished(tmp_path / "out", {}) as run:
            for _ in range(layers):
                finish_layer(run)
            raise OSError(errno.ENOSPC, "No space left on device")
        assert listing(tmp_path) == (["out.log", "out.partial"] if layers else [])


# Removal, cut short after any number of steps.


class Killed(BaseException):
    """Instead of SIGKILL: nothing that is done after it is done."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that change the file system from the ``step``-th on raise."""
    done = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] >= step:
                raise Killed
            return real(*args, **options)

        return call

    for name in ("unlink", "rmdir", "rename", "replace", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def test_a_removal_that_is_cut_short_is_finished_by_the_next_run(tmp_path: Path) -> None:
    for step in range(1, 100):
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        run = Unfinished(out, REQUEST_OF)
        run.open()
        finish_layer(run)
        finish_layer(run)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(step, patch)
            try:
                run.remove()
                ended = True
            except Killed:
                ended = False
        with unfinished(out, REQUEST_OF) as again:  # no error, and either all of it or nothing
            assert again.finished in (0, 2)
            assert listing(again.folder) == ["activations", "layers", REQUEST]
            make_checkpoint(again)
        assert listing(out.parent) == ["out", "out.log"] or not again.finished
        if ended:
            assert step > 8
            return
    raise AssertionError("it does not end")


def test_a_start_that_is_cut_short_is_no_hindrance(tmp_path: Path) -> None:
    for step in range(1, 100):
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            killed_at(step, patch)
            try:
                Unfinished(out, REQUEST_OF).open()
                ended = True
            except Killed:
                ended = False
        with unfinished(out, REQUEST_OF) as again:
            assert not again.finished
            finish_layer(again)
            make_checkpoint(again)
        assert listing(out.parent) == ["out", "out.log"]
        if ended:
            assert step > 5
            return
    raise AssertionError("it does not end")


@pytest.mark.parametrize("left", ["published", "removing", "empty", "lock"])
def test_what_a_kill_left_beside_a_finished_output_goes(left: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Unfinished(out, REQUEST_OF)
    run.open()
    finish_layer(run)
    make_checkpoint(run)
    lock_file(out).touch()
    if left in ("removing", "empty"):
        for path in run.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left == "removing":
        (run.folder / "removing.json").touch()
        (run.folder / "layers").mkdir()
    elif left == "lock":
        run.remove()
    with pytest.raises(OutputError, match="a file or folder of that name"):
        require_free(out)
    assert set(listing(tmp_path)) - {"out.log"} == {"out"}


def test_layers_of_another_output_than_the_one_that_is_there_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Unfinished(out, REQUEST_OF)
    run.open()
    finish_layer(run)
    for published in (False, True):
        if published:
            make_checkpoint(run)
            shutil.rmtree(out)
        out.mkdir()
        (out / FILE).write_text("another one")
        with pytest.raises(OutputError):
            require_free(out)
        assert finished_layers(out) == 1
        shutil.rmtree(out)


# The lock.


def test_one_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with alone(out):
        with pytest.raises(OutputError, match=r"another process that holds out\.lock"), alone(out):
            raise AssertionError
        assert lock_file(out).exists()
    assert listing(tmp_path) == []
    with alone(out):
        pass


def test_a_lock_whose_file_has_lost_its_name_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes the file between our opening it and our locking it."""
    out, calls = tmp_path / "out", []
    real = fcntl.flock

    def late(handle: int, how: int) -> None:
        if not calls:
            lock_file(out).unlink()
        elif len(calls) == 1:
            lock_file(out).unlink()
            lock_file(out).touch()  # and a third has made another
        calls.append(handle)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with alone(out):
        assert len(calls) == 3
        monkeypatch.setattr(fcntl, "flock", real)
        with pytest.raises(OutputError), alone(out):
            raise AssertionError


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    lock_file(tmp_path / "out").symlink_to(tmp_path / "theirs")
    with pytest.raises(OutputError), unfinished(tmp_path / "out", {}):
        raise AssertionError
    assert not (tmp_path / "theirs").exists()


# Records.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run with three finished layers and rotations."""
    run = Unfinished(tmp_path / "out", REQUEST_OF)
    run.open()
    run.keep_rotations(OfflineRotations(residual=ROTATION))
    for _ in range(3):
        finish_layer(run)
    return run.folder


def test_the_record_is_written_after_all_that_it_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each name is known to the disk, by an fsync of its folder, before the record gets its own."""
    run = Unfinished(folder.parent / "out", REQUEST_OF)
    run.open()
    names: list[str] = []
    synced: set[str] = set()
    replace, fsync = os.replace, os.fsync

    def seen(source: Any, target: Any) -> None:
        if Path(target).name == "00003.json":
            expected = {"00003.safetensors", "00004-00000.safetensors", "00004-00001.safetensors"}
            assert expected <= synced
            assert len(list(run.activations.iterdir())) == 4  # what led here is still there
        names.append(Path(target).name)
        replace(source, target)

    def kept(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            synced.update(each.name for each in path.iterdir())
        fsync(handle)

    monkeypatch.setattr(os, "replace", seen)
    monkeypatch.setattr(os, "fsync", kept)
    finish_layer(run)
    assert names[-1] == "00003.json"
    assert "00003.json" in synced
    assert len(list(run.activations.iterdir())) == 2


def test_a_seal_binds_a_record_to_its_place(folder: Path, tmp_path: Path) -> None:
    layers = folder / "layers"
    for change in (
        lambda: shutil.copy(layers / "00001.json", layers / "00000.json"),
        lambda: edit(layers / "00001.json", lambda c: c["sites"][0].update(output_error=0.5)),
        lambda: edit(layers / "00001.json", lambda c: c["files"].popitem()),
        lambda: edit(layers / "00001.json", lambda c: c.pop("seal")),
        lambda: edit(layers / "00002.json", lambda c: c.update(seal=seal_of("", c))),
        lambda: shutil.copy(other_run(tmp_path / "other") / "layers/00000.json", layers),
    ):
        kept = shutil.copytree(folder, tmp_path / "kept")
        change()
        with pytest.raises(CheckpointError, match="whose seal"):
            Unfinished(tmp_path / "out", REQUEST_OF).open()
        shutil.rmtree(folder)
        kept.rename(folder)
    Unfinished(tmp_path / "out", REQUEST_OF).open()


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_run(room: Path) -> Path:
    """With the same tensors, asked for something else."""
    room.mkdir()
    run = Unfinished(room / "out", {**REQUEST_OF, "model": "n"})
    run.open()
    finish_layer(run)
    return run.folder


def test_another_request_is_told_field_by_field(folder: Path) -> None:
    other = copy.deepcopy(REQUEST_OF)
    other["recipe"]["method"]["rounds"] = 3  # type: ignore[index]
    other["recipe"]["seed"] = 1  # type: ignore[index]
    with pytest.raises(OutputError) as caught, unfinished(folder.parent / "out", other):
        raise AssertionError
    assert "recipe.seed = 0 (now 1)" in str(caught.value)
    assert "recipe.method.rounds = None (now 3)" in str(caught.value)
    assert "model" not in caught.value.found
    assert finished_layers(folder.parent / "out") == 3


def test_rotations_come_back(folder: Path) -> None:
    run = Unfinished(folder.parent / "out", REQUEST_OF)
    run.open()
    found = run.rotations()
    assert found is not None
    assert found.residual is not None
    assert torch.equal(found.residual.matrix(), ROTATION.matrix())
    assert found.heads == ()


RECORDS = [REQUEST, "layers/00000.json", "layers/00002.json", "rotations.json"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``folder``, for many examples."""
    run = Unfinished(tmp_path_factory.mktemp("state") / "out", REQUEST_OF)
    run.open()
    run.keep_rotations(OfflineRotations(residual=ROTATION))
    for _ in range(3):
        finish_layer(run, states=1)
    return run.folder


@pytest.mark.parametrize("name", RECORDS)
def test_odd_records(name: str, state: Path, tmp_path: Path) -> None:
    """What is not refused says what was written; memory is bounded."""
    honest = (state / name).read_bytes()
    meant = json.loads(honest)

    @fuzz(80)
    @given(
        content=texts(meant) | damaged(honest) | odd(meant).map(lambda v: json.dumps(v).encode())
    )
    def check(content: bytes) -> None:
        (state / name).write_bytes(content)
        run = Unfinished(state.parent / "out", REQUEST_OF)
        read = False
        with bounded(len(content) + 20_000), only_ours():
            run.open()
            run.rotations()
            read = True
        if read:
            assert json.loads(content) == meant
            assert run.finished == 3

    check()
    (state / name).write_bytes(honest)


def test_a_file_of_another_kind_in_the_place_of_the_folder(tmp_path: Path) -> None:
    partial_folder(tmp_path / "out").write_text("theirs")
    with pytest.raises(MxtorqError, match="a link or a file of that name"):
        Unfinished(tmp_path / "out", {}).open()
    assert listing(tmp_path) == ["out.partial"]
