"""Licences travel with a checkpoint, and a README never ends a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mxtorq import pipeline
from mxtorq.config import Recipe, parse_method
from mxtorq.errors import CheckpointError
from mxtorq.export.card import Papers
from mxtorq.export.checkpoint import read_manifest
from mxtorq.loading.papers import LONGEST, read_papers

README = """---
license: other
license_name: acme
license_link: LICENSE
base_model: acme/base
---
# Acme
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "acme-1b"
    path.mkdir()
    (path / "README.md").write_text(README)
    (path / "LICENSE").write_text("Do as you like.")
    (path / "Notice.txt").write_text("By Acme.")
    (path / "license_plates.csv").mkdir()
    (path / "config.json").write_text("{}")
    return path


def test_a_folder(folder: Path) -> None:
    assert read_papers(str(folder)) == Papers(
        base_models=("acme/base",),
        license="other",
        license_name="acme",
        license_link="LICENSE",
        files={"LICENSE": b"Do as you like.", "Notice.txt": b"By Acme."},
    )


def test_a_folder_without_any(tmp_path: Path) -> None:
    assert read_papers(str(tmp_path)) == Papers()


def test_what_is_too_large_or_elsewhere_is_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_bytes(b"\xff" + README.encode())
    (folder / "LICENSE").write_bytes(b"x" * (LONGEST + 1))
    (tmp_path / "secret").write_text("a key")
    (folder / "NOTICE").symlink_to(tmp_path / "secret")
    (folder / "COPYING").symlink_to("nowhere")
    assert read_papers(str(folder)) == Papers(files={"Notice.txt": b"By Acme."})


def test_a_link_to_a_file_that_is_not_copied_is_dropped(folder: Path) -> None:
    (folder / "LICENSE").unlink()
    assert read_papers(str(folder)).license_link is None


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "1").write_text("Free.")
    (snapshot / "LICENSE").symlink_to("../../blobs/1")
    assert read_papers(str(snapshot)).files == {"LICENSE": b"Free."}


def test_a_model_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.hub

    def cached_file(name: str, file: str, **asked: Any) -> str | None:
        assert name == "acme/acme-1b"
        if file.startswith("NOTICE"):
            raise OSError("no network")
        found = folder / file
        return str(found) if found.is_file() else None

    monkeypatch.setattr(transformers.utils.hub, "cached_file", cached_file)
    papers = read_papers("acme/acme-1b")
    assert papers.hub_name == "acme/acme-1b"
    assert papers.files == {"LICENSE": b"Do as you like."}
    assert papers.license_link == "LICENSE"
    (folder / "LICENSE").unlink()
    papers = read_papers("acme/acme-1b")
    assert papers.license_link == "https://huggingface.co/acme/acme-1b/blob/main/LICENSE"


def test_the_reference_model_is_under_the_packages_licence() -> None:
    assert read_papers("reference").license == "apache-2.0"


def test_a_checkpoint_has_its_card(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_folders["qwen3"], tmp_path / "acme-1b"))
    (source / "README.md").write_text(README)
    (source / "LICENSE").write_text("Free.")
    settings = Recipe(
        method=parse_method("hadamard"), calibration=str(story), calibration_tokens=512, seqlen=64
    )
    texts = []
    for out in (tmp_path / "one", tmp_path / "two"):
        manifest = pipeline.quantize(str(source), out, settings, device="cpu")
        assert manifest == read_manifest(out)
        assert (
            {"README.md", "LICENSE"}
            < set(manifest.files)
            == ({path.name for path in out.iterdir()} - {"mxtorq.json"})
        )
        assert list(manifest.files) == sorted(manifest.files)
        texts.append((out / "README.md").read_text())
    assert texts[0] == texts[1]
    assert "# acme-1b in MXFP4" in texts[0]
    assert 'license_name: "acme"' in texts[0]
    assert json.loads((out / "mxtorq.json").read_text())["files"]["LICENSE"]["bytes"] == 5
    (out / "README.md").write_text("Mine.")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        read_manifest(out)
