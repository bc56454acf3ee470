"""Quark's layout: the same bytes, the schema of amd-quark 0.13, and the way back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mxtorq.errors import CheckpointError, UsageError
from mxtorq.export import checkpoint
from mxtorq.export.checkpoint import read_checkpoint
from mxtorq.export.convert import export
from mxtorq.export.packed import read_packed
from mxtorq.export.quark import quark_config
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.loading.checkpoint import build_model
from mxtorq.models import FAMILIES
from mxtorq.writing import write_tensors

# What amd-quark 0.13 itself writes for OCP_MXFP4Spec(ch_axis=-1, is_dynamic=...), as it was run.
TENSOR = {
    "dtype": "fp4",
    "qscheme": "per_group",
    "ch_axis": -1,
    "group_size": 32,
    "block_size": None,
    "symmetric": None,
    "round_method": "half_even",
    "scale_type": "float",
    "zero_point_type": "int32",
    "scale_format": "e8m0",
    "scale_calculation_mode": "even",
    "mx_element_dtype": None,
    "observer_cls": "PerBlockMXObserver",
    "is_scale_quant": False,
}


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))
    return folder


def test_the_configuration_is_quarks_own() -> None:
    config = quark_config(exclude=["lm_head"], input_rule=ScaleRule.EVEN)
    layer = config["global_quant_config"]
    assert layer["weight"] == {**TENSOR, "is_dynamic": False}
    assert layer["input_tensors"] == {**TENSOR, "is_dynamic": True}
    assert (config["quant_method"], config["exclude"]) == ("quark", ["lm_head"])
    assert config["export"]["kv_cache_group"] == []  # vLLM looks for it
    alone = quark_config(exclude=[], input_rule=None)
    assert alone["global_quant_config"]["input_tensors"] is None


def test_rules_that_quark_would_take_for_another_are_refused() -> None:
    for rule in ScaleRule:
        if rule.value in ("floor", "even", "ceil"):
            layer = quark_config(exclude=[], input_rule=rule)["global_quant_config"]
            assert layer["input_tensors"]["scale_calculation_mode"] == rule.value
        else:
            with pytest.raises(UsageError, match="in silence"):
                quark_config(exclude=[], input_rule=rule)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_bytes_are_those_of_the_checkpoint(
    quantized: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    source = quantized(family)
    done = export(source, tmp_path / "quark", "quark")
    ours, theirs = read_packed(source), read_packed(tmp_path / "quark")
    assert sorted(done.files) == sorted(path.name for path in (tmp_path / "quark").iterdir())
    assert set(ours.linears) == set(theirs.linears)
    assert theirs.shards.entry("model.layers.0.self_attn.q_proj.weight").dtype == torch.uint8
    for linear in ours.linears:
        for a, b in zip(ours.codes(linear), theirs.codes(linear), strict=True):
            assert torch.equal(a, b)
    assert sorted(ours.plain) == sorted(theirs.plain)
    for name in ours.plain:
        assert torch.equal(ours.shards.tensor(name), theirs.shards.tensor(name))
    assert theirs.input_rule is ScaleRule.EVEN
    described = json.loads((tmp_path / "quark" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in described["exclude"]
    assert ("model.layers.1.mlp.gate" in described["exclude"]) == (family == "qwen3_moe")


def test_from_quark_to_compressed_tensors_and_into_stock_transformers(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    source = quantized("qwen3")
    export(source, tmp_path / "quark", "quark")
    done = export(tmp_path / "quark", tmp_path / "stock", "compressed-tensors")
    assert done.method is None
    ours, stock = read_packed(source), read_packed(tmp_path / "stock")
    for linear in ours.linears:
        for a, b in zip(ours.codes(linear), stock.codes(linear), strict=True):
            assert torch.equal(a, b)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = build_model(read_checkpoint(source), "", FAMILIES["qwen3"])(input_ids=ids).logits
        assert torch.equal(theirs(input_ids=ids).logits, expected)


def test_large_models_are_a_file_a_layer(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SINGLE_FILE", 1000)
    export(quantized("llama"), tmp_path / "quark", "quark")
    files = [path.name for path in (tmp_path / "quark").glob("*.safetensors")]
    assert len(files) == 2 + 3  # layers; embedding, norm, head
    assert len(read_packed(tmp_path / "quark").linears) == 14


def test_the_rule_that_a_source_does_not_record_is_called_that(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    source = quantized("llama", "identity", "floor")
    export(source, tmp_path / "stock", "compressed-tensors")
    done = export(tmp_path / "stock", tmp_path / "quark", "quark")
    assert "does not record" in done.notes[0]
    assert "'floor'" in export(source, tmp_path / "direct", "quark").notes[0]


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda q: q.update(layer_quant_config={"*q_proj": {}}), "layer_quant_config"),
        (lambda q: q.update(algo_config=[{"name": "rotation"}]), "algo_config"),
        (lambda q: q["global_quant_config"]["weight"].update(dtype="int4"), "int4"),
        (lambda q: q["global_quant_config"].update(bias={"dtype": "int8"}), "biases"),
        (lambda q: q.update(quant_method="awq"), "awq"),
    ],
)
def test_quark_folders_that_say_more_are_refused(
    quantized: Callable[..., Path], tmp_path: Path, edit: Callable[[Any], Any], found: str
) -> None:
    export(quantized("llama"), tmp_path / "quark", "quark")
    with pytest.raises(CheckpointError, match=found):
        read_packed(change(tmp_path / "quark", edit))


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda q: q.update(transform_config={"config_groups": {}, "r": 1}), "transform_config"),
        (lambda q: q["config_groups"]["group_0"].update(format="nvfp4-pack"), "nvfp4"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=8), "no MXFP4"),
        (lambda q: q.pop("config_groups"), "config_groups"),
    ],
)
def test_compressed_tensors_folders_that_say_more_are_refused(
    quantized: Callable[..., Path], tmp_path: Path, edit: Callable[[Any], Any], found: str
) -> None:
    export(quantized("llama"), tmp_path / "stock", "compressed-tensors")
    with pytest.raises(CheckpointError, match=found):
        read_packed(change(tmp_path / "stock", edit))


def test_weights_alone_stay_weights_alone(quantized: Callable[..., Path], tmp_path: Path) -> None:
    export(quantized("llama"), tmp_path / "stock", "compressed-tensors")
    change(
        tmp_path / "stock", lambda q: q["config_groups"]["group_0"].update(input_activations=None)
    )
    done = export(tmp_path / "stock", tmp_path / "quark", "quark")
    assert done.input_rule is None
    assert "W4A16" in done.notes[0]
    assert read_packed(tmp_path / "quark").input_rule is None


def test_a_tensor_that_belongs_to_another_scheme_is_refused(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    export(quantized("llama"), tmp_path / "quark", "quark")
    model = read_packed(tmp_path / "quark")
    tensors = {name: model.shards.tensor(name) for name in model.shards.names}
    name = "model.layers.0.mlp.down_proj.input_rotation"
    write_tensors(tmp_path / "quark" / "model.safetensors", {**tensors, name: torch.eye(32)})
    with pytest.raises(CheckpointError, match="input_rotation"):
        read_packed(tmp_path / "quark")
