"""The verb inspect: of a model what MXFP4 sees, of a checkpoint what it is, and its refusals."""

from pathlib import Path

import pytest

from command import here
from mxtorq.config import Recipe, parse_method
from mxtorq.pipeline import quantize
from mxtorq.reports.inspection import Inspection


def run(*arguments: object) -> tuple[int, str]:
    done = here("inspect", *arguments)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkpoint(
    tiny_folders: dict[str, Path], story: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    recipe = Recipe(
        method=parse_method("identity"), calibration=str(story), calibration_tokens=128, seqlen=64
    )
    quantize(str(tiny_folders["llama"]), out, recipe, device="cpu")
    return out


def test_a_model_is_measured_and_recorded(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    record, page = tmp_path / "i.json", tmp_path / "i.md"
    code, text = run(
        tiny_folders["llama"],
        *("--calibration", story, "--calibration-tokens", 256, "--seqlen", 64),
        *("--methods", "hadamard", "--sites", "down_in", "--sensitivity"),
        *("--text", story, "--eval-tokens", 128, "--json", record, "--markdown", page),
        *("--report", tmp_path / "i.html"),
    )
    assert code == 0, text
    found = Inspection.from_json(record.read_text())
    assert (tmp_path / "i.html").read_text().startswith("<!doctype html>")
    assert found.methods == ["identity", "hadamard"]
    assert len(found.harm) == 4
    assert found.command.startswith("mxtorq ")
    for title in ("What MXFP4 sees", "does what it promises", "Massive", "hurt the model most"):
        assert title in text
        assert title in page.read_text()


def test_a_checkpoint_says_what_it_is(checkpoint: Path) -> None:
    code, text = run(checkpoint)
    assert code == 0
    assert "model.layers.1.down_in" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("OUT", "--methods", "torq", "--scale-rule", "even"), "--methods"),
        (("OUT", "--markdown", "page.md"), "rounded already"),
        (("MODEL", "--eval-tokens", "128"), "pass --sensitivity"),
        (("MODEL", "--methods", "trq"), "did you mean 'torq'"),
        (("MODEL", "--sites", "up_in"), "gate_up_in"),
        (("MODEL", "--scale-rule", "log256"), "no power of two"),
        (("MODEL", "--seqlen", "4096"), "--seqlen 128 or less"),
        (("no/such/model",), "reference"),
    ],
)
def test_errors_teach(
    arguments: tuple[str, ...],
    message: str,
    checkpoint: Path,
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"OUT": checkpoint, "MODEL": tiny_folders["llama"]}
    code, text = run(*(places.get(each, each) for each in arguments))
    assert code == 1
    assert message in text
    for part in ("asked:", "found:", "why:", "to do:"):
        assert part in text
    assert list(tmp_path.iterdir()) == []
