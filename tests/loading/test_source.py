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
from mxtorq.models import FAMILIES

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


def test_a_float32_source_is_rounded_to_bfloat16(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "m")
    tiny_models.tokenizer().save_pretrained(tmp_path / "m")
    source = load_source(str(tmp_path / "m"), CPU)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    found = source.model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert torch.equal(found, weight.bfloat16().float())
    assert not torch.equal(found, weight)


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
    edit_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])
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


def test_code_of_the_author_is_refused(folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit('it ran')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(ModelError, match="trust_remote_code is off"):
        load_source(str(folder), CPU)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ModelError, match="Merge the adapter"):
        load_source(str(folder), CPU)


def test_sizes_are_checked_before_anything_is_built(folder: Path) -> None:
    for changes in ({"num_hidden_layers": 10**9}, {"head_dim": 10**12}, {"vocab_size": 10**12}):
        honest = (folder / "config.json").read_text()
        edit_config(folder, **changes)
        with pytest.raises(ModelError, match=r"config\.json|num_hidden_layers"):
            load_source(str(folder), CPU)
        (folder / "config.json").write_text(honest)


def shard(folder: Path) -> dict[str, str]:
    """Split the weights of a folder into two files and an index; returns its table."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    table: dict[str, str] = {}
    for at, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{at}-of-00002.safetensors"
        save_file({k: tensors[k] for k in some}, folder / file, metadata={"format": "pt"})
        table.update(dict.fromkeys(some, file))
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return table


def test_shards_are_read_and_their_index_may_not_lead_away(folder: Path, tmp_path: Path) -> None:
    expected = load_source(str(folder), CPU).fingerprint()
    table = shard(folder)
    assert load_source(str(folder), CPU).fingerprint() == expected
    name, file = next(iter(table.items()))
    shutil.copy(folder / file, tmp_path / file)
    for wrong in (f"../{file}", str(tmp_path / file)):
        index = {"weight_map": {**table, name: wrong}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match="without any path"):
            load_source(str(folder), CPU)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_in_the_cache_of_the_hub_is_checked_too(
    sharded: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the cache: a revision is a folder of links to blobs."""
    expected = load_source(str(folder), CPU).fingerprint()
    if sharded:
        shard(folder)
    root = tmp_path / "hub" / "models--some--model"
    snapshot = root / "snapshots" / ("0" * 40)
    for made in (snapshot, root / "refs", root / "blobs"):
        made.mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    for path in folder.iterdir():
        shutil.move(path, root / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_source("some/model", CPU).fingerprint() == expected
    weights = sorted((root / "blobs").glob("model*.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="is truncated"):
        load_source("some/model", CPU)


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
