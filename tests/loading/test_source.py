"""Models are read with suspicion: every way in which one can be wrong has its message."""

import json
import logging
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file

import tiny_models
from mxtorq.errors import ModelError
from mxtorq.loading.source import load_source, pick_device
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
    with pytest.raises(ModelError, match=rf"{re.escape(shards[1])}: FileNotFoundError"):
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


@pytest.mark.parametrize("name", ["nofolder", "no-such-organisation/no-such-model"])
def test_a_slip_in_the_name_of_a_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are said: that there is no folder, and that the hub did not help."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        load_source(name, CPU)
    assert "no folder of that name here, and the hub could not be reached" in caught.value.found
    assert "HF_HUB_OFFLINE is set" in caught.value.found
    assert ("organisation/model" in caught.value.why) is ("/" not in name)


def test_a_model_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its client says it: the cause of what transformers raises."""

    def missing(*args: object, **kwargs: object) -> None:
        raise OSError("not a valid model identifier") from RepositoryNotFoundError(
            "404", response=mock.Mock(headers={})
        )

    monkeypatch.setattr("transformers.utils.hub.cached_file", missing)
    with pytest.raises(ModelError, match="no folder of that name here, and on the hub no such"):
        load_source("nofolder", CPU)


def test_retries_of_the_hubs_client_are_not_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its warnings are dropped while a model is read, its errors are not, and afterwards none."""
    client = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)

    def retried(*args: object, **kwargs: object) -> None:
        client.warning("thrown while requesting HEAD")
        client.error("an error")
        raise OSError("no")

    monkeypatch.setattr("transformers.utils.hub.cached_file", retried)
    before = hub_logging.get_verbosity()
    with pytest.raises(ModelError):
        load_source("nofolder", CPU)
    assert hub_logging.get_verbosity() == before
    client.warning("afterwards")
    assert caplog.messages == ["an error", "afterwards"]


def test_a_gated_model_says_to_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach here; the message is the one that its client raises."""

    def gated(*args: object, **kwargs: object) -> None:
        raise OSError("You are trying to access a gated repo. 401 Client Error.")

    monkeypatch.setattr("transformers.utils.hub.cached_file", gated)
    with pytest.raises(ModelError, match="hf auth login"):
        load_source("meta-llama/Llama-3.1-8B", CPU)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"needs config\.json") as refused:
        load_source(str(tmp_path), CPU)
    assert str(tmp_path / "config.json") in str(refused.value)


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
        with pytest.raises(ModelError, match=r"neither model\.safetensors nor its index"):
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


@pytest.mark.parametrize("at_rest", [False, True])
def test_values_that_transformers_stumbles_over(folder: Path, at_rest: bool) -> None:
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": []})
    with pytest.raises(ModelError):
        load_source(str(folder), CPU, at_rest=at_rest)


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
