"""A manifest in vLLM's terms: names, sites, and what is refused."""

import shutil
import sys
import tomllib
from pathlib import Path

import huggingface_hub
import pytest
import torch

import mxtorq
from mxtorq.config import Recipe
from mxtorq.errors import CheckpointError, UsageError
from mxtorq.export.checkpoint import TRANSFORMS
from mxtorq.export.manifest import FILE
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.serving.vllm import plugin
from mxtorq.serving.vllm.checkpoint import (
    Checkpoint,
    find_checkpoint,
    no_experts,
    require_whole_blocks,
    unfused,
)
from mxtorq.surgery.linear import MXFP4Linear

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def folder(
    tiny_folders: dict[str, Path], story: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny Llama by WUSH: a matrix for each block, and activations by another rule."""
    out = tmp_path_factory.mktemp("serving") / "out"
    recipe = Recipe(
        method=mxtorq.parse_method("wush"),
        scale_rule=ScaleRule.EVEN,
        calibration=str(story),
        calibration_tokens=512,
        seqlen=64,
    )
    mxtorq.quantize(str(tiny_folders["llama"]), out, recipe)
    return out


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return find_checkpoint(str(folder))


def test_fused_names_are_taken_apart() -> None:
    layer = "model.layers.0"
    assert unfused(f"{layer}.self_attn.qkv_proj", FUSED) == [
        f"{layer}.self_attn.{part}_proj" for part in "qkv"
    ]
    assert unfused(f"{layer}.mlp.down_proj", FUSED) == [f"{layer}.mlp.down_proj"]
    assert unfused("lm_head", FUSED) == ["lm_head"]
    assert unfused("qkv_proj", FUSED) == ["q_proj", "k_proj", "v_proj"]


def test_each_fused_linear_has_its_site(checkpoint: Checkpoint) -> None:
    sites = {
        "self_attn.qkv_proj": "qkv_in",
        "self_attn.o_proj": "o_in",
        "mlp.gate_up_proj": "gate_up_in",
        "mlp.down_proj": "down_in",
    }
    for name, site in sites.items():
        entry = checkpoint.site_of(unfused(f"model.layers.1.{name}", FUSED))
        assert entry is not None
        assert entry.site == f"model.layers.1.{site}"
    assert checkpoint.site_of(["lm_head"]) is None


@pytest.mark.parametrize("other", ["self_attn.o_proj", "mlp.router"])
def test_a_mixture_is_refused(checkpoint: Checkpoint, other: str) -> None:
    with pytest.raises(CheckpointError, match="fuses these into one product"):
        checkpoint.site_of(["model.layers.0.self_attn.q_proj", f"model.layers.0.{other}"])


def test_transforms_and_rule_are_those_of_the_loaded_model(
    checkpoint: Checkpoint, folder: Path
) -> None:
    assert checkpoint.rule is ScaleRule.EVEN
    model = mxtorq.load(folder, "cpu")
    for entry in checkpoint.manifest.sites:
        linear = model.get_submodule(entry.linears[0])
        assert isinstance(linear, MXFP4Linear)
        found = checkpoint.transform_of(entry).tensors()
        expected = linear.transform.tensors()
        assert list(found) == list(expected) == ["matrices"]
        assert torch.equal(found["matrices"], expected["matrices"])


def test_a_damaged_file_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((copy / TRANSFORMS).read_bytes())
    data[-1] ^= 1
    (copy / TRANSFORMS).write_bytes(data)
    with pytest.raises(CheckpointError, match="missing, truncated, changed"):
        find_checkpoint(str(copy))


def test_a_hub_id_is_fetched_and_checked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (FILE, TRANSFORMS):
        shutil.copy(folder / name, tmp_path)
    asked = []

    def download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((model, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = find_checkpoint("somebody/model", "main")
    assert asked == [("somebody/model", "main", [FILE, TRANSFORMS])]
    assert found.manifest == find_checkpoint(str(folder)).manifest
    (tmp_path / TRANSFORMS).write_bytes(b"other")
    with pytest.raises(CheckpointError, match="not the file that the manifest describes"):
        find_checkpoint("somebody/model")


def test_a_hub_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="ConnectionError: no network"):
        find_checkpoint("somebody/model")


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mxtorq quantize"):
        find_checkpoint(str(tmp_path))


def test_blocks_are_not_cut() -> None:
    require_whole_blocks("model.layers.0.mlp.down_proj", 96, 32, 2)
    with pytest.raises(UsageError, match="--tensor-parallel-size that divides 3"):
        require_whole_blocks("model.layers.0.mlp.down_proj", 48, 32, 2)


def test_experts_are_refused_with_a_way_out() -> None:
    assert "mxtorq.load" in str(no_experts("model.layers.0.mlp.experts"))


def test_an_engine_that_does_not_fit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.warns(RuntimeWarning, match="does not fit this vLLM"):
        plugin.register()


def test_the_entry_point_names_the_function() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"mxtorq": f"{plugin.__name__}:{plugin.register.__name__}"}
