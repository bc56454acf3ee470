"""Models are read with suspicion: every way in which one can be wrong has its message."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from mxtorq.errors import ModelError
from mxtorq.loading.source import load_source, pick_device, staged_
from tiny_models import FAMILIES

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A private copy of the tiny Llama."""
    return Path(shutil.copytree(tiny_folders["llama"], tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_those_of_the_file_in_float32(name: str, tiny_folders: dict[str, Path]) -> None:
    source = load_source(str(tiny_folders[name]), CPU)
    stored = load_file(tiny_folders[name] / "model.safetensors")
    for key, tensor in stored.items():
        assert torch.equal(source.model.state_dict()[key], tensor.float()), key
    assert source.family.name == name
    assert not source.model.training
    assert source.longest_window() == 128


@pytest.mark.parametrize("shard", ["100MB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_source_dtype_is_rounded_to_bfloat16(
    dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    """In one file or in several; ties go to even, and FP16's subnormals are kept."""
    model = tiny_models.build("qwen2")
    name = "model.layers.0.mlp.up_proj"
    special = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(2.0**-24), 65504.0])
    model.get_submodule(name).weight[0, :4] = special
    model.to(dtype).save_pretrained(tmp_path / "m", max_shard_size=shard)
    tiny_models.tokenizer().save_pretrained(tmp_path / "m")
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "100KB")
    source = load_source(str(tmp_path / "m"), CPU)
    stored = model.state_dict()
    for key, value in source.model.state_dict().items():
        assert torch.equal(value, stored[key].bfloat16().float()), key
    found = source.model.get_submodule(name).weight
    assert found[0, :4].tolist() == [1.0, 1 + 2**-6, -(2.0**-24), 65536.0]
    assert torch.equal(found, stored[f"{name}.weight"].float()) == (dtype == torch.bfloat16)


def test_float32_beyond_bfloat16_is_refused(folder: Path) -> None:
    """It has the same exponents, so only what rounds up to 2^128 is out of range."""
    tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    weight[0, 0] = torch.finfo(torch.bfloat16).max
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_source(str(folder), CPU).model
    assert loaded.model.layers[0].mlp.up_proj.weight[0, 0] == torch.finfo(torch.bfloat16).max
    weight[0, 0] = torch.finfo(torch.float32).max
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight \(after rounding to BF16\)"):
        load_source(str(folder), CPU)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tiny model in several files."""
    model = tiny_models.build("mistral").bfloat16()
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    tiny_models.tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    (sharded / shards[1]).unlink()
    with pytest.raises(ModelError, match=f"1 of its {len(shards)} shards missing, .* {shards[1]}"):
        load_source(str(sharded), CPU)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": null}'])
def test_a_damaged_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError):
        load_source(str(sharded), CPU)


def test_an_index_without_a_tensor(sharded: Path) -> None:
    """Its file is there, and nobody looks into it."""
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    lost = "model.layers.0.input_layernorm.weight"
    shard = index["weight_map"].pop(lost)
    assert shard in index["weight_map"].values()
    path.write_text(json.dumps(index))
    tensors = load_file(sharded / shard)
    del tensors[lost]
    save_file(tensors, sharded / shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=lost):
        load_source(str(sharded), CPU)


@pytest.mark.parametrize("name", ["no/such/folder/here", "./nothing", "no such model", "a/b/c"])
def test_what_is_no_model_at_all(name: str) -> None:
    with pytest.raises(ModelError, match="hub id"):
        load_source(name, CPU)


def test_a_hub_model_that_cannot_be_had() -> None:
    with pytest.raises(ModelError, match="check the name and the network"):
        load_source("no-such-organisation/no-such-model", CPU)


def test_a_gated_model_says_to_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach here; the message is the one that its client raises."""

    def gated(*args: object, **kwargs: object) -> None:
        raise OSError("You are trying to access a gated repo. 401 Client Error.")

    monkeypatch.setattr("transformers.utils.hub.cached_file", gated)
    with pytest.raises(ModelError, match="hf auth login"):
        load_source("meta-llama/Llama-3.1-8B", CPU)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"needs config\.json"):
        load_source(str(tmp_path), CPU)


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"'])
def test_a_damaged_configuration(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError):
        load_source(str(folder), CPU)


def test_an_unknown_architecture(folder: Path) -> None:
    edit_config(folder, model_type="llama4", architectures=["Llama4ForCausalLM"])
    with pytest.raises(ModelError, match="nearest family is 'llama'"):
        load_source(str(folder), CPU)


def test_a_quantized_model(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"quantized already .*'gptq'"):
        load_source(str(folder), CPU)


def test_sliding_windows(folder: Path) -> None:
    edit_config(folder, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ModelError, match="sliding_attention"):
        load_source(str(folder), CPU)


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("mistral", {"sliding_window": None}, ""),
        ("mistral", {"sliding_window": 64}, "a sliding window of 64"),
        ("mistral", {}, "a sliding window of 4096"),  # what the class takes where nothing is said
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}, ""),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, ""),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "sliding_attention",
        ),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}, ""),
    ],
)
def test_windows_that_are_set_and_those_that_are_used(
    name: str,
    changes: dict[str, object],
    found: str,
    tiny_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(tiny_folders[name], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    for key in ("sliding_window", "use_sliding_window", "layer_types"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    if found:
        with pytest.raises(ModelError, match=found) as caught:
            load_source(str(folder), CPU)
        assert "sliding_window to null" in caught.value.todo
    else:
        load_source(str(folder), CPU)


def test_real_configurations_are_accepted(data: Path, tmp_path: Path) -> None:
    """Nothing is missing but the weights."""
    found = 0
    for path in sorted((data / "configs").glob("*.json")):
        folder = tmp_path / path.stem
        folder.mkdir()
        shutil.copy(path, folder / "config.json")
        with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
            load_source(str(folder), CPU)
        found += 1
    assert found >= 15


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_broken_weights_are_named(folder: Path, bad: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load_source(str(folder), CPU)


def test_a_missing_tensor_is_not_filled_with_random_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="random numbers"):
        load_source(str(folder), CPU)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load_source(str(folder), CPU)


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"undamaged \*\.safetensors"):
        load_source(str(folder), CPU)


def test_pickles_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelError, match="safetensors"):
        load_source(str(folder), CPU)


def test_a_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError):
        load_source(str(folder), CPU)


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps", "xpu")


def test_layers_are_moved_one_ahead(tiny_folders: dict[str, Path]) -> None:
    """At rest they are BF16; each is placed before it is handed out, and the next meanwhile."""
    family = FAMILIES["qwen3"]
    source = load_source(str(tiny_folders["qwen3"]), CPU, at_rest=True)
    layers = list(source.model.get_submodule(family.layers).children())

    def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
        return {parameter.dtype for parameter in module.parameters()}

    assert [dtypes(layer) for layer in layers] == [{torch.bfloat16}] * len(layers)
    assert source.model.lm_head.weight.dtype == torch.float32
    assert source.device == CPU
    assert len(layers) > 1
    for index, layer in enumerate(staged_(layers, CPU)):
        assert layer is layers[index]
        assert dtypes(layer) == {torch.float32}
        if index + 1 < len(layers):
            deadline = time.monotonic() + 30
            while dtypes(layers[index + 1]) != {torch.float32}:
                assert time.monotonic() < deadline, "the next layer is not moved meanwhile"
                time.sleep(0.01)
        assert all(dtypes(layer) == {torch.bfloat16} for layer in layers[index + 2 :])
    placed = load_source(str(tiny_folders["qwen3"]), CPU).model.state_dict()
    staged = source.model.state_dict()
    assert list(placed) == list(staged)
    assert all(torch.equal(placed[key], staged[key]) for key in placed)


def test_what_fails_while_moving_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(3)]
    layers[1].weight = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
    seen = []
    with pytest.raises(NotImplementedError, match="meta"):
        for layer in staged_(layers, CPU):
            seen.append(layer)
    assert seen == layers[:1]
