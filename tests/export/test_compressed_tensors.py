"""Our quantization_config is what the real library's own schema accepts and means."""

import pytest

from mxtorq.export.compressed_tensors import WEIGHTS_FILE, quantization_config


def test_the_library_reads_it_as_mxfp4_w4a4() -> None:
    library = pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    content = quantization_config(own=False, ignore=["lm_head"], transforms={})
    assert content["quant_method"] == "compressed-tensors"
    config = library.QuantizationConfig.model_validate(content)
    scheme = config.config_groups["group_0"]
    preset = library.quantization.preset_name_to_scheme("MXFP4", ["Linear"])
    for part in ("weights", "input_activations"):
        ours, theirs = getattr(scheme, part), getattr(preset, part)
        for field in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic"):
            assert getattr(ours, field) == getattr(theirs, field), (part, field)
    assert config.format == "mxfp4-pack-quantized"
    assert config.ignore == ["lm_head"]


def test_rotated_checkpoints_are_of_another_method_and_file() -> None:
    content = quantization_config(own=True, ignore=[], transforms={})
    assert content["quant_method"] == "mxtorq"
    assert content["format"] == "mxfp4-pack-quantized"
    assert WEIGHTS_FILE["mxtorq"] != WEIGHTS_FILE["compressed-tensors"] == "model.safetensors"
