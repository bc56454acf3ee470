"""A family of the caller's own: any decoder that it describes, named in what is written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, SmolLM3Config

import mxtorq
import tiny_models
from mxtorq.errors import CheckpointError, MxtorqError
from mxtorq.export.manifest import Manifest
from mxtorq.models.family import Family
from mxtorq.models.llama import LLAMA

SMOL = replace(LLAMA, name="smol", model_type="smollm3", architecture="SmolLM3ForCausalLM")
"""Not one of ours: every fourth layer has no rotary positions, which is no matter of names."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SmolLM3."""
    llama = tiny_models.CONFIGS["llama"]
    sizes = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    config = SmolLM3Config(
        **{name: getattr(llama, name) for name in sizes},
        num_hidden_layers=4,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return tiny_models.save(model, tmp_path_factory.mktemp("smol") / "model")


def quantize(folder: Path, out: Path, story: Path, family: Family | None) -> Manifest:
    recipe = mxtorq.Recipe(
        method=mxtorq.parse_method("quarot"),
        calibration=str(story),
        calibration_tokens=256,
        seqlen=64,
    )
    return mxtorq.quantize(str(folder), out, recipe, device="cpu", family=family)


def test_a_model_that_we_do_not_know(folder: Path, story: Path, tmp_path: Path) -> None:
    """Rotated, quantized, written and read back bit for bit; its name is in the manifest, and the
    checkpoint needs the family again."""
    with pytest.raises(MxtorqError, match="describe it as a Family"):
        quantize(folder, tmp_path / "out", story, None)
    manifest = quantize(folder, tmp_path / "out", story, SMOL)
    assert manifest.source["family"] == "smol"
    assert len(manifest.sites) == 16
    with pytest.raises(CheckpointError, match=r"mxtorq\.load\(path, family=\.\.\.\)"):
        mxtorq.load(tmp_path / "out", device="cpu")
    model = mxtorq.load(tmp_path / "out", device="cpu", family=SMOL)
    assert type(model).__name__ == "SmolLM3ForCausalLM"
    plan = mxtorq.EvaluationPlan(text=str(story), eval_tokens=256, seqlen=64)
    results = mxtorq.evaluate(str(tmp_path / "out"), plan, device="cpu", family=SMOL)
    assert results.rows[0].method == "quarot"
    with pytest.raises(MxtorqError, match="pass the family 'smol'"):
        mxtorq.load(tmp_path / "out", device="cpu", family=replace(SMOL, name="other"))


def test_one_of_ours_needs_no_other(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """An equal description under its own name is ours, another one under that name is refused."""
    out = tmp_path / "out"
    manifest = quantize(tiny_folders["llama"], out, story, replace(LLAMA))
    assert manifest.source["family"] == "llama"
    mxtorq.load(out, device="cpu")
    mxtorq.load(out, device="cpu", family=LLAMA)
    with pytest.raises(MxtorqError, match="give yours another name"):
        mxtorq.load(out, device="cpu", family=replace(LLAMA, residual_writers=()))
    with pytest.raises(MxtorqError, match="pass the family 'llama', or none"):
        mxtorq.load(out, device="cpu", family=replace(LLAMA, name="mine"))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (replace(SMOL, name="llama"), "give yours another name"),
        (replace(SMOL, model_type="smollm"), "a model of type 'smollm3'"),
        (replace(SMOL, layers="model.blocks"), "blocks"),
        (replace(SMOL, final_norm="model.last_norm"), "last_norm"),
        (replace(SMOL, residual_writers=("mlp.c_proj",)), "c_proj"),
        (replace(SMOL, head="model.norm"), "the linear model.norm"),
    ],
)
def test_what_cannot_be_meant(
    family: Family, message: str, folder: Path, story: Path, tmp_path: Path
) -> None:
    with pytest.raises(MxtorqError, match=message):
        quantize(folder, tmp_path / "out", story, family)
    assert not (tmp_path / "out").exists()
