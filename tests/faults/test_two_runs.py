"""Two runs and one folder: one works, the other is told, and nobody touches what is not his."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.harness import Run, Server, beside, digest, require_right, wait_until_stopped


@pytest.mark.parametrize("part", [0, 0.3, 0.8])
def test_the_second_is_refused_and_the_first_undisturbed(
    part: float, server: Server, runs: dict[str, Run], tmp_path: Path
) -> None:
    """The first is stopped in the middle, so both are there at once."""
    run, out = runs["kept"], tmp_path / "out"
    first = server.start(run, out, {"kind": "stop", "at": 2 + int(part * run.events)})
    wait_until_stopped(first)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for other in (run, runs["rotated"]):
        second = server.run(other, out)
        assert second.error == "OutputError"
        assert "another process that holds out.lock" in second.message
        assert second.work < run.work  # before the work
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    os.kill(first, signal.SIGCONT)
    assert server.wait(first).error is None
    require_right(out, run)


def test_a_lock_of_the_dead_holds_nobody(
    server: Server, runs: dict[str, Run], tmp_path: Path
) -> None:
    run, out = runs["kept"], tmp_path / "out"
    assert server.run(run, out, {"kind": "kill", "at": run.events // 2}).killed
    assert "out.lock" in beside(out)
    assert server.run(run, out).error is None
    require_right(out, run)


@pytest.fixture(scope="module")
def killed(
    server: Server, runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder with a run that finished a layer."""
    room = tmp_path_factory.mktemp("killed")
    run = runs["kept"]
    assert server.run(run, room / "out", {"kind": "kill", "at": run.events // 2}).killed
    assert list(room.rglob("layers/*.json"))
    (room / "out.lock").unlink()
    listed = digest(room)
    yield room
    assert digest(room) == listed  # none of the refusals has touched it


OTHER = {
    "recipe.method.rounds": {"method": "torq:rounds=2:top=2:pairs=1:blocks=64"},
    "recipe.method.name": {"method": "hadamard"},
    "recipe.rounding": {"rounding": "rtn"},
    "recipe.scale_rule": {"scale_rule": "rceil"},
    "recipe.calibration_tokens": {"calibration_tokens": 128},
    "recipe.seqlen": {"seqlen": 32},
    "recipe.seed": {"seed": 1},
}


def refused(server: Server, run: Run, killed: Path, **changes: Any) -> str:
    other = Run(**{**vars(run), "recipe": {**run.recipe, **changes}})
    ended = server.run(other, killed / "out")
    assert ended.error == "OutputError", (ended.error, ended.message)
    assert "to go on with the unfinished run" in ended.message
    assert "name another output, or remove that folder" in ended.message
    return ended.message


@pytest.mark.parametrize("field", OTHER)
def test_another_recipe_is_told_what_differs(
    field: str, server: Server, runs: dict[str, Run], killed: Path
) -> None:
    assert f"{field}" in refused(server, runs["kept"], killed, **OTHER[field])


def test_another_text_or_model_is_told(
    server: Server, runs: dict[str, Run], killed: Path, tmp_path: Path
) -> None:
    run = runs["kept"]
    text = tmp_path / "other.txt"
    text.write_text("Pack my box with five dozen liquor jugs. " * 60)
    assert "calibration.text_sha256" in refused(server, run, killed, calibration=str(text))
    moved = Path(shutil.copytree(run.model, tmp_path / "moved"))
    found = refused(server, Run(**{**vars(run), "model": moved}), killed)
    assert "model = " in found
    assert "weights" not in found
    deep = Run(**{**vars(run), "model": runs["spilled"].model})
    assert "weights = " in refused(server, deep, killed)


def test_the_same_text_under_the_same_name_with_other_words(
    server: Server, runs: dict[str, Run], tmp_path: Path
) -> None:
    text = tmp_path / "story.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    run = Run(**{**vars(runs["kept"]), "recipe": {**runs["kept"].recipe, "calibration": str(text)}})
    assert server.run(run, tmp_path / "out", {"kind": "kill", "at": run.events // 2}).killed
    text.write_text("The quick brown fox jumps over the lazy cat. " * 60)
    ended = server.run(run, tmp_path / "out")
    assert ended.error == "OutputError"
    assert "calibration.tokens_sha256" in ended.message


def test_other_versions_or_another_machine(
    server: Server, runs: dict[str, Run], killed: Path, tmp_path: Path
) -> None:
    for field, place in (("versions.torch", "versions"), ("machine.threads", "machine")):
        room = Path(shutil.copytree(killed, tmp_path / place))
        path = room / "out.partial" / "run.json"
        content = json.loads(path.read_text())
        content[place][field.partition(".")[2]] = "0.1"
        path.write_text(json.dumps(content))
        ended = server.run(runs["kept"], room / "out")
        assert ended.error == "OutputError"
        assert f"{field} = '0.1'" in ended.message


# What is somebody else's.


@pytest.mark.parametrize("kind", ["files", "deep", "link in it", "link", "file", "dangling"])
def test_a_foreign_folder_is_neither_used_nor_removed(
    kind: str, server: Server, runs: dict[str, Run], tmp_path: Path
) -> None:
    partial, theirs = tmp_path / "room" / "out.partial", tmp_path / "theirs"
    partial.parent.mkdir()
    theirs.mkdir()
    (theirs / "thesis").write_text("final")
    if kind == "files":
        partial.mkdir()
        (partial / "thesis").write_text("final")
    elif kind == "deep":
        (partial / "layers" / "empty").mkdir(parents=True)
    elif kind == "link in it":
        partial.mkdir()
        (partial / "layers").symlink_to(theirs)
    elif kind == "link":
        partial.symlink_to(theirs)
    elif kind == "dangling":
        partial.symlink_to(tmp_path / "nowhere")
    else:
        partial.write_text("final")
    listed = sorted((path, path.is_symlink()) for path in tmp_path.rglob("*"))
    for out_exists in (False, True):
        ended = server.run(runs["kept"], partial.with_name("out"))
        assert ended.error == "OutputError", (ended.error, ended.message)
        assert ("a file or folder of that name" in ended.message) == out_exists
        found = sorted((path, path.is_symlink()) for path in tmp_path.rglob("*"))
        assert [each for each in found if each[0].name != "out"] == listed
        partial.with_name("out").mkdir(exist_ok=True)
    assert (theirs / "thesis").read_text() == "final"


def test_unfinished_work_beside_a_strange_output_stays(
    server: Server, runs: dict[str, Run], killed: Path, tmp_path: Path
) -> None:
    """Somebody puts another folder where the output should be: the layers are not thrown away."""
    room = Path(shutil.copytree(killed, tmp_path / "room"))
    (room / "out").mkdir()
    (room / "out" / "mxtorq.json").write_text("{}")
    ended = server.run(runs["kept"], room / "out")
    assert "a file or folder of that name" in ended.message
    shutil.rmtree(room / "out")
    again = server.run(runs["kept"], room / "out", {"kind": "count"})
    assert again.error is None
    assert again.events < runs["kept"].events
    require_right(room / "out", runs["kept"])


def test_a_parent_that_nobody_may_write_to(
    server: Server, runs: dict[str, Run], tmp_path: Path
) -> None:
    for out in (Path("/proc/new/out"), Path("/proc/out"), tmp_path / "file" / "out"):
        (tmp_path / "file").touch()
        ended = server.run(runs["kept"], out, root=str(tmp_path))
        assert ended.error == "OutputError", (out, ended.error, ended.message)
    for out in (Path("/"), Path("."), Path("..")):
        ended = server.run(runs["kept"], out, root=str(tmp_path))
        assert "a file or folder of that name" in ended.message
    assert beside(tmp_path / "out") == ["file"]
