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

from mxtorq.errors import CheckpointError, OutputError
from mxtorq.export.checkpoint import (
    TensorWriter,
    fingerprints,
    output_folder,
    read_checkpoint,
    read_manifest,
    require_absent,
    write_config,
    write_manifest,
    write_transforms,
)
from mxtorq.export.compressed_tensors import quantization_config
from mxtorq.export.manifest import Manifest


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


CONFIG = {
    "model_type": "llama",
    "hidden_size": 4,
    "quantization_config": quantization_config(rotated=True, ignore=[]),
}
TENSORS = {"w": torch.arange(12).view(3, 4), "b": torch.ones(3, dtype=torch.bfloat16)}
PARTS = {"site.rotation": torch.eye(2, dtype=torch.float64)}


def manifest(files: dict[str, dict[str, object]]) -> Manifest:
    return Manifest(
        method="torq",
        rounding="rtn",
        recipe={"method": {}, "rounding": {}},
        scale_rules={"weights": "floor", "activations": "floor"},
        seed=0,
        source={"model": "m", "family": "llama", "outliers": None},
        calibration={"source": "s", "tokens": 1, "seqlen": 1, "seed": 0},
        versions={},
        sites=[],
        unfit={},
        files=files,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, as far as its files go."""
    made = tmp_path / "made"
    made.mkdir()
    write_config(made, CONFIG)
    write_transforms(made, PARTS)
    writer = TensorWriter(made)
    for name, tensor in TENSORS.items():
        writer.add({name: tensor})
    writer.finish("mxtorq-model.safetensors")
    write_manifest(made, manifest(fingerprints(made)))
    return made


def list_files(folder: Path, **changes: object) -> None:
    """Rewrite the manifest for the files that are there, except for some."""
    (folder / "mxtorq.json").unlink()
    files = {k: v for k, v in {**fingerprints(folder), **changes}.items() if v is not None}
    write_manifest(folder, manifest(files))  # type: ignore[arg-type]


def test_a_checkpoint_is_read_as_it_was_written(folder: Path) -> None:
    contents = read_checkpoint(folder)
    assert contents.config == CONFIG
    assert contents.transforms is not None
    for found, expected in ((contents.weights, TENSORS), (contents.transforms, PARTS)):
        assert set(found.names) == set(expected)
        assert all(torch.equal(found.tensor(name), expected[name]) for name in expected)


@pytest.mark.parametrize(
    "name", ["../stranger", "/etc/hostname", "..", ".", "", "a/b", "a\0b", "x" * 300]
)
def test_a_manifest_names_files_of_its_folder(folder: Path, name: str) -> None:
    (folder.parent / "stranger").write_text("secret")
    (folder / "a").mkdir()
    (folder / "a" / "b").touch()
    (folder / "mxtorq.json").unlink()
    facts: dict[str, object] = {"sha256": "0", "bytes": 6}
    write_manifest(folder, manifest({name: facts}))
    with pytest.raises(CheckpointError, match=r"out of the folder|no such file") as caught:
        read_manifest(folder)
    assert "2bb80d53" not in str(caught.value)  # the hash of what stands there is not told


def test_a_file_of_another_size_is_not_even_hashed(folder: Path) -> None:
    with (folder / "mxtorq-model.safetensors").open("ab") as file:
        file.truncate(2**40)  # a hole: hashing it would take an hour
    with pytest.raises(CheckpointError, match=f"{2**40} bytes, the manifest says"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "generation_config.json", "vocab.json"),
        *("mxtorq-model.safetensors.index.json", "model.safetensors"),
    ],
)
def test_a_file_that_the_manifest_does_not_name_is_not_read(folder: Path, name: str) -> None:
    (folder / "README.md").touch()
    read_manifest(folder)
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name}, which the manifest does not name"):
        read_manifest(folder)


def test_what_is_read_has_a_fingerprint(folder: Path) -> None:
    for name in ("config.json", "mxtorq-model.safetensors"):
        list_files(folder, **{name: None})
        with pytest.raises(CheckpointError, match=f"{name}, which the manifest does not name"):
            read_checkpoint(folder)
    list_files(folder)
    assert set(read_checkpoint(folder).weights.names) == set(TENSORS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "type list"),
        ("{}", "model_type"),
        ('{"model_type": "llama"}', "quant_method = None"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": []}}', "none of"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "none of"),
        ('{"model_type": "llama", "auto_map": {"AutoConfig": "x"}}', "trust_remote_code"),
        (
            '{"model_type": "llama", "vocab_size": 1000000000, '
            '"quantization_config": {"quant_method": "mxtorq"}}',
            "the embedding",
        ),
    ],
)
def test_configurations_that_agree_with_the_manifest_and_are_odd(
    folder: Path, text: str, message: str
) -> None:
    (folder / "config.json").write_text(text)
    list_files(folder)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)
