"""A rank that does not lead sees the leader's run, or says why not."""

from pathlib import Path

import pytest

from mxtorq.errors import CheckpointError, OutputError
from mxtorq.export.following import following, require_shared
from mxtorq.export.unfinished import partial_folder, unfinished

ASKED = {"model": "m", "recipe": {"seed": 0}}


def test_it_sees_the_folder_and_the_same_request(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with unfinished(out, ASKED) as led, following(out) as followed:
        require_shared(out, ASKED)
        assert followed.activations == led.activations
        assert followed.activations.is_dir()
        with pytest.raises(OutputError, match=r"recipe\.seed = 0 \(now 1\)"):
            require_shared(out, {**ASKED, "recipe": {"seed": 1}})
        (partial_folder(out) / "run.json").write_text("{")
        with pytest.raises(CheckpointError):
            require_shared(out, ASKED)


def test_a_folder_that_it_does_not_see(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="on every rank") as caught:
        require_shared(tmp_path / "out", ASKED)
    assert "file system that all machines share" in caught.value.todo


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="No space left"),
        following(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
