"""Exports appear whole or not at all, and say what they are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mxtorq.errors import CheckpointError, OutputError, UsageError, VerificationError
from mxtorq.export import layouts
from mxtorq.export.appearing import appearing
from mxtorq.export.convert import Format, export
from mxtorq.export.output import alone
from mxtorq.writing import fingerprint


def test_a_record_names_files_and_what_to_know(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    done = export(
        quantized("llama"),
        tmp_path / "new" / "out",
        Format.QUARK,
        progress=lambda *step: seen.append(step),
    )
    record = json.loads(done.to_json())
    assert (record["schema"], record["format"], record["method"]) == (
        "mxtorq.export",
        "quark",
        "identity",
    )
    assert record["linears"] == 14
    for name, facts in record["files"].items():
        assert fingerprint(tmp_path / "new" / "out" / name) == facts
    assert "README.md" in record["files"]
    assert "tokenizer.json" in record["files"]
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2]


def test_options_that_change_nothing_are_refused(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    source = quantized("llama")
    with pytest.raises(UsageError, match="--undo-transforms"):
        export(source, tmp_path / "out", "quark", undo_transforms=True)
    with pytest.raises(UsageError, match="--without-tokenizer"):
        export(source, tmp_path / "out", "fake-quant", without_tokenizer=True)
    with pytest.raises(UsageError, match="gguf, quark, fake-quant, compressed-tensors"):
        export(source, tmp_path / "out", "awq")
    with pytest.raises(UsageError, match=r"out\.gguf"):
        export(source, tmp_path / "out", "gguf")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="nothing is overwritten"):
        export(source, tmp_path / "there", "quark")
    with pytest.raises(CheckpointError, match="exports start from"):
        export(tmp_path / "there", tmp_path / "out", "quark")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_stock_layouts_do_not_take_transforms(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    for layout in ("quark", "compressed-tensors"):
        with pytest.raises(UsageError, match="runs online"):
            export(quantized("qwen3", "hadamard"), tmp_path / "out", layout)
    assert not list(tmp_path.iterdir())


def test_what_reads_back_otherwise_does_not_appear(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "fake_quantized", iter_of_values())
    with pytest.raises(VerificationError, match="read back"):
        export(quantized("llama"), tmp_path / "out", "fake-quant")
    assert not list(tmp_path.iterdir())


def iter_of_values() -> Callable[..., torch.Tensor]:
    """Another value at each call: what is compared is not what was written."""
    count = iter(range(10_000))
    return lambda codes, name: torch.full((1, 1), next(count), dtype=torch.bfloat16)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_what_ends_early(tmp_path: Path, error: type[BaseException]) -> None:
    for kind in ("file", "folder"):
        with pytest.raises(error), appearing(tmp_path / "out") as staging:
            if kind == "file":
                staging.write_text("half")
            else:
                staging.mkdir()
                (staging / "part").write_text("half")
            raise error
    assert not list(tmp_path.iterdir())


def test_leavings_of_a_kill_are_taken_away_and_a_running_process_is_not(tmp_path: Path) -> None:
    left = tmp_path / ".out.exporting"
    left.mkdir()
    (left / "old").touch()
    with appearing(tmp_path / "out") as staging:
        assert not staging.exists()
        staging.write_text("new")
    assert (tmp_path / "out").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with (
        alone(tmp_path / "other"),
        pytest.raises(OutputError, match="another process"),
        appearing(tmp_path / "other"),
    ):
        pass


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), appearing(tmp_path / "out"):
        raise OSError(28, "No space left on device")
