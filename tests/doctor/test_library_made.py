"""A checkpoint that compressed-tensors, the library, has made, under the doctor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxtorq.doctor.engines import verdicts
from mxtorq.doctor.examination import examine
from mxtorq.doctor.subject import open_subject
from mxtorq.formats import mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.reports.findings import Status

library = pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")


@pytest.fixture(scope="module")
def made(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen3 under the library's own preset MXFP4, by its own observer and compressor."""
    quantization = library.quantization
    out = tmp_path_factory.mktemp("library") / "made"
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folders["qwen3"], dtype=torch.bfloat16)
    scheme = quantization.preset_name_to_scheme("MXFP4", ["Linear"])
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format="mxfp4-pack-quantized",
        quantization_status="initialized",
    )
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            blocks = module.weight.detach().unflatten(-1, (-1, 32))
            scale, _ = quantization.utils.calculate_qparams(
                blocks.amin(-1), blocks.amax(-1), scheme.weights
            )
            module.weight_scale.data.copy_(scale)
            module.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = library.ModelCompressor.from_pretrained_model(
        model, quantization_format="mxfp4-pack-quantized"
    )
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    AutoTokenizer.from_pretrained(tiny_folders["qwen3"]).save_pretrained(out)
    return out


def test_it_is_sound(made: Path, tiny_folders: dict[str, Path], story: Path) -> None:
    found = examine(made, original=str(tiny_folders["qwen3"]), text=str(story), tokens=512)
    assert found.healthy, found
    told = {finding.check: finding for finding in found.findings}
    assert told["files"].status is Status.NOTE  # no hashes
    assert told["weights"].status is told["logits"].status is Status.OK
    assert "even" in told["scale rule"].text


def test_its_bytes_are_ours_under_even(made: Path, tiny_folders: dict[str, Path]) -> None:
    theirs = load_file(made / "model.safetensors")
    weights = load_file(tiny_folders["qwen3"] / "model.safetensors")
    names = [name.removesuffix("_packed") for name in theirs if name.endswith("weight_packed")]
    assert names
    for name in names:
        ours = mxfp4.quantize(weights[name].bfloat16().float(), ScaleRule.EVEN)
        assert torch.equal(ours.e8m0, theirs[f"{name}_scale"])
        values, expected = (
            mxfp4.dequantize(mxfp4.MXFP4(packed, ours.e8m0), torch.float32)
            for packed in (theirs[f"{name}_packed"], ours.packed)
        )
        assert torch.equal(values, expected)


def test_a_checkpoint_for_weights_alone(made: Path, tmp_path: Path) -> None:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    notes = [f.text for f in examine(tmp_path).findings if f.check == "inputs"]
    assert len(notes) == 1
    assert "W4A16" in notes[0]
    runs = {v.engine: (v.runs_as, v.why) for v in verdicts(open_subject(tmp_path))}
    assert runs["transformers"][0] == "W4A16"
    assert runs["vllm-blackwell"][0] == "W4A4"
    assert "56770" in runs["vllm-blackwell"][1]
