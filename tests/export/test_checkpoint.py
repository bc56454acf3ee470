"""A checkpoint is placed from pieces and read with suspicion; how it appears: `test_unfinished`."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from mxtorq.errors import CheckpointError
from mxtorq.export import checkpoint
from mxtorq.export.checkpoint import (
    place_tensors,
    place_transforms,
    read_checkpoint,
    read_manifest,
    write_config,
    write_manifest,
)
from mxtorq.export.compressed_tensors import quantization_config
from mxtorq.export.manifest import Manifest
from mxtorq.writing import fingerprint, write_tensors

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4,
    "quantization_config": quantization_config(own=True, ignore=[], transforms={}),
}
TENSORS = {"w": torch.arange(12).view(3, 4), "b": torch.ones(3, dtype=torch.bfloat16)}
WEIGHTS = "mxtorq-model.safetensors"
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


def fingerprints(folder: Path) -> dict[str, dict[str, object]]:
    return {path.name: fingerprint(path) for path in sorted(folder.iterdir())}


def pieces(folder: Path, tensors: dict[str, torch.Tensor]) -> list[Path]:
    """A file for each tensor."""
    paths = [folder / f"{name}.safetensors" for name in tensors]
    for path, (name, tensor) in zip(paths, tensors.items(), strict=True):
        write_tensors(path, {name: tensor})
    return paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, as far as its files go."""
    made, parts = tmp_path / "made", tmp_path / "pieces"
    made.mkdir()
    parts.mkdir()
    write_config(made, CONFIG)
    place_transforms(made, pieces(parts, PARTS))
    place_tensors(made, WEIGHTS, pieces(parts, TENSORS))
    write_manifest(made, manifest(fingerprints(made)))
    return made


@pytest.mark.parametrize("links", [True, False])
def test_a_large_checkpoint_is_made_of_links_or_copies(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, "no links on this disk")

    monkeypatch.setattr(checkpoint, "SINGLE_FILE", 0)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    made = tmp_path / "made"
    made.mkdir()
    parts = pieces(tmp_path, TENSORS)
    place_tensors(made, WEIGHTS, parts)
    names = [f"mxtorq-model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(path.name for path in made.iterdir()) == sorted([*names, f"{WEIGHTS}.index.json"])
    for name, part in zip(names, parts, strict=True):
        assert (made / name).read_bytes() == part.read_bytes()
        assert (made / name).samefile(part) == links
    index = json.loads((made / f"{WEIGHTS}.index.json").read_text())
    assert index["weight_map"] == dict(zip(TENSORS, names, strict=True))
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in TENSORS.values())}


def test_no_transforms_make_no_file(tmp_path: Path) -> None:
    place_transforms(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_a_piece_that_is_damaged_is_not_placed(tmp_path: Path) -> None:
    parts = pieces(tmp_path, TENSORS)
    os.truncate(parts[0], parts[0].stat().st_size - 1)
    with pytest.raises(CheckpointError, match="checkpoint that is being written"):
        place_tensors(tmp_path, WEIGHTS, parts)
    assert not (tmp_path / WEIGHTS).exists()


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
