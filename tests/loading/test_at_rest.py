"""A model that stays on disk: one layer ahead, nothing more, and the values of the whole model."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny_models
from mxtorq import pipeline
from mxtorq.calibration.capture import first_layer_inputs
from mxtorq.config import Recipe, parse_method, parse_rounding
from mxtorq.errors import ModelError
from mxtorq.export import checkpoint
from mxtorq.loading import at_rest
from mxtorq.loading.at_rest import embedded, staged_, stored_parts, stored_value
from mxtorq.loading.source import load_source
from mxtorq.models import FAMILIES
from mxtorq.quantization import quantize_

CPU = torch.device("cpu")


def dtypes(module: torch.nn.Module) -> set[tuple[str, torch.dtype]]:
    return {(parameter.device.type, parameter.dtype) for parameter in module.parameters()}


READ = {("cpu", torch.float32), ("cpu", torch.bfloat16)}
AT_REST = {("meta", torch.bfloat16)}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_read_one_ahead(name: str, tiny_folders: dict[str, Path]) -> None:
    family = FAMILIES[name]
    source = load_source(str(tiny_folders[name]), CPU, at_rest=True)
    whole = load_source(str(tiny_folders[name]), CPU)
    assert dtypes(source.model) == AT_REST
    assert (source.device, source.dtype) == (CPU, torch.float32)
    layers = list(source.model.get_submodule(family.layers).children())
    assert len(layers) > 1
    for number, (index, layer) in enumerate(staged_(source)):
        assert index == number
        assert layer is layers[index]
        assert dtypes(layer) == READ
        if index + 1 < len(layers):
            deadline = time.monotonic() + 30
            while dtypes(layers[index + 1]) != READ:
                assert time.monotonic() < deadline, "the next layer is not read meanwhile"
                time.sleep(0.01)
        assert all(dtypes(layer) == AT_REST for layer in layers[index + 2 :])
    placed, read = (each.model.get_submodule(family.layers) for each in (whole, source))
    found = dict(read.named_parameters())
    assert list(found) == [key for key, _ in placed.named_parameters()]
    assert all(torch.equal(found[key].float(), value) for key, value in placed.named_parameters())
    linears = [path for path, part in read.named_modules() if isinstance(part, nn.Linear)]
    narrow = {key: value for key, value in found.items() if value.dtype == torch.bfloat16}
    assert set(narrow) == {f"{path}.weight" for path in linears}
    # All experts' linears of a name lie in one piece, which is no heap's to keep.
    kinds = {(key.split(".")[0], key.split(".")[-2]) for key in narrow}
    assert len({value.untyped_storage().data_ptr() for value in narrow.values()}) == len(kinds)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_layer_gets_the_same(name: str, tiny_folders: dict[str, Path]) -> None:
    family, windows = FAMILIES[name], tiny_models.tokens(3, 32)
    source = load_source(str(tiny_folders[name]), CPU, at_rest=True)
    with embedded(source):
        found = first_layer_inputs(source.model, family, windows, source.device, source.dtype)
    assert dtypes(source.model) == AT_REST  # the embedding was let go
    whole = load_source(str(tiny_folders[name]), CPU)
    expected = first_layer_inputs(whole.model, family, windows)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.hidden, other.hidden)
        for mine, theirs in zip(
            one.arguments["position_embeddings"],
            other.arguments["position_embeddings"],
            strict=True,
        ):
            assert torch.equal(mine, theirs)


RECIPES = [
    ("hadamard", "rtn"),
    ("torq", "gptq"),
    ("smoothquant:sites=all", "gptq"),
    ("duquant++:steps=4", "gptq:inputs=rounded"),
    ("wush", "gptq:order=backward"),
]


@pytest.mark.parametrize(("method", "rounding"), RECIPES)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_the_bits_are_those_of_the_model_in_memory(
    name: str, method: str, rounding: str, tiny_folders: dict[str, Path], story: Path
) -> None:
    """Layers whose weights wait in BF16 and layers that are in float32 as a whole."""
    recipe = Recipe(
        method=parse_method(method),
        rounding=parse_rounding(rounding),
        calibration=str(story),
        calibration_tokens=512,
        seqlen=64,
    )
    found = []
    for kept_on_disk in (True, False):
        source = load_source(str(tiny_folders[name]), CPU, at_rest=kept_on_disk)
        ids = pipeline.calibrate(source, recipe).ids
        quantized = quantize_(source, ids, recipe, pipeline.silent)
        children = source.model.get_submodule(source.family.layers).children()
        found.append(([layer.state_dict() for layer in children], quantized))
    (layers, one), (expected, other) = found
    assert len(layers) == len(expected) > 1
    for layer, like in zip(layers, expected, strict=True):
        assert list(layer) == list(like)
        assert any(key.endswith("weight_packed") for key in layer)
        assert all(torch.equal(layer[key], like[key]) for key in layer)
    assert one.sites == other.sites


def test_parts_are_the_value(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_rest, "_NUMBERS", 100)
    expected = load_file(tiny_folders["llama"] / "model.safetensors")
    for kept_on_disk in (True, False):
        source = load_source(str(tiny_folders["llama"]), CPU, at_rest=kept_on_disk)
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            parts = list(stored_parts(source, name))
            assert [rows.stop for rows, _ in parts[:-1]] == [rows.start for rows, _ in parts[1:]]
            assert torch.equal(torch.cat([part for _, part in parts]), expected[name])
            assert torch.equal(stored_value(source, name), expected[name])
        assert len(parts) == 1


def test_what_cannot_be_read_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "m"))
    path = folder / "model.safetensors"
    good = load_file(path)
    key = "model.layers.1.mlp.down_proj.weight"
    for wrong in ({k: v for k, v in good.items() if k != key}, {**good, key: good[key][:1]}):
        save_file(wrong, path, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"1 tensors missing or of another shape.*{key}"):
            load_source(str(folder), CPU, at_rest=True)
    for wrong_number in ("nan", "inf", "-inf"):
        bad = good[key].clone()
        bad[-1, -1] = float(wrong_number)
        save_file({**good, key: bad}, path, metadata={"format": "pt"})
        source = load_source(str(folder), CPU, at_rest=True)  # nothing is read yet
        with pytest.raises(ModelError, match=f"NaN or Inf in {key}"):
            list(staged_(source))
    largest = torch.full_like(bad, torch.finfo(torch.bfloat16).max)
    save_file({**good, key: largest}, path, metadata={"format": "pt"})
    assert torch.equal(stored_value(load_source(str(folder), CPU, at_rest=True), key), largest)


def test_every_dtype_becomes_bfloat16(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / str(dtype)))
        tensors = load_file(folder / "model.safetensors")
        scaled = {name: (1.001 * value.float()).to(dtype) for name, value in tensors.items()}
        save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
        source = load_source(str(folder), CPU, at_rest=True)
        for name, value in scaled.items():
            assert torch.equal(stored_value(source, name), value.bfloat16())


def test_a_large_checkpoint_is_a_file_a_layer(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tensors and predictions as in one file; and a source in shards gives them too."""
    recipe = Recipe(
        method=parse_method("torq"), calibration=str(story), calibration_tokens=512, seqlen=64
    )
    model = str(tiny_folders["qwen3"])
    pipeline.quantize(model, tmp_path / "one", recipe, device="cpu")
    monkeypatch.setattr(checkpoint, "SINGLE_FILE", 0)
    pipeline.quantize(model, tmp_path / "many", recipe, device="cpu")
    one, many = (checkpoint.read_checkpoint(tmp_path / name) for name in ("one", "many"))
    assert one.weights.files == ["mxtorq-model.safetensors"]
    layers = len({name.split(".")[2] for name in many.weights.names if ".layers." in name})
    assert len(many.weights.files) > layers > 1
    index = json.loads((tmp_path / "many" / "mxtorq-model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == many.weights.total_bytes
    assert sorted(one.weights.names) == sorted(many.weights.names)
    assert all(
        torch.equal(one.weights.tensor(name), many.weights.tensor(name))
        for name in one.weights.names
    )
    ids = tiny_models.tokens(1, 16)
    logits = [pipeline_logits(tmp_path / name, ids) for name in ("one", "many")]
    assert torch.equal(*logits)


def pipeline_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from mxtorq import load

    logits: torch.Tensor = load(folder, device="cpu")(input_ids=ids).logits
    return logits
