"""from_pretrained gives the model of mxtorq.load, bit for bit, and nothing where it cannot."""

import importlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import mxtorq.export.checkpoint
import tiny_models
from mxtorq import pipeline
from mxtorq.config import Recipe, parse_method
from mxtorq.errors import CheckpointError, UsageError
from mxtorq.export.checkpoint import read_checkpoint
from mxtorq.export.compressed_tensors import quantization_config
from mxtorq.export.targets import Target
from mxtorq.loading.checkpoint import build_model, load
from mxtorq.models import FAMILIES
from mxtorq.serving import registration
from mxtorq.serving.transformers import MxtorqConfig, MxtorqQuantizer
from mxtorq.surgery.linear import MXFP4Linear
from mxtorq.surgery.site_input import SiteInput
from mxtorq.writing import fingerprint

CASES = {
    "llama": "torq",  # biases everywhere
    "qwen2": "wush",  # biases on q, k and v, and a tied head
    "qwen3": "hadamard",
    "qwen3_moe": "duquant++:steps=8",  # experts, chains of transforms
    "carried": "hadamard",  # of Qwen3, by transform_config
}
IDS = torch.arange(40)[None] % 256


def quantized(family: str, source: Path, story: Path, out: Path) -> Path:
    recipe = Recipe(
        method=parse_method(CASES[family]),
        target=Target.VLLM_BLACKWELL if family == "carried" else Target.MXTORQ,
        calibration=str(story),
        calibration_tokens=512,
        seqlen=64,
    )
    pipeline.quantize(str(source), out, recipe, device="cpu")
    return out


@pytest.fixture(scope="module")
def written(
    tiny_folders: dict[str, Path], story: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A rotated checkpoint of some families."""
    root = tmp_path_factory.mktemp("written")
    folders = {**tiny_folders, "carried": tiny_folders["qwen3"]}
    return {name: quantized(name, folders[name], story, root / name) for name in CASES}


@pytest.fixture
def changed(written: dict[str, Path], tmp_path: Path) -> Path:
    """A private copy of a checkpoint, to be changed."""
    return Path(shutil.copytree(written["llama"], tmp_path / "changed"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=IDS).logits
    return values


def rewrite(folder: Path, file: str, change: Any) -> None:
    """Change a JSON file of a checkpoint, and the hash that the manifest has of it."""
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    if file != "mxtorq.json":
        rewrite(
            folder, "mxtorq.json", lambda m: m["files"].update({file: fingerprint(folder / file)})
        )


@pytest.mark.parametrize("family", CASES)
def test_it_is_the_model_that_load_builds(family: str, written: dict[str, Path]) -> None:
    ours = load(written[family], device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(written[family], dtype=torch.float32)
    assert torch.equal(logits(ours), logits(theirs))
    expected, found = ours.state_dict(), theirs.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    asked = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    assert torch.equal(ours.generate(IDS[:, :8], **asked), theirs.generate(IDS[:, :8], **asked))
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not theirs.training
    assert not any(parameter.requires_grad for parameter in theirs.parameters())
    assert "transformers_weights" not in theirs.config.to_dict()
    described = json.loads((written[family] / "config.json").read_text())["quantization_config"]
    # A carried one is called compressed-tensors' on disk, and is ours once it is loaded by us.
    assert json.loads(theirs.config.to_json_string())["quantization_config"] == {
        **described,
        "quant_method": "mxtorq",
    }


@pytest.mark.parametrize("family", CASES)
def test_in_bfloat16_transforms_are_not_rounded(family: str, written: dict[str, Path]) -> None:
    """The dtype of config.json is the default, and transformers makes it the default of torch."""
    of = "qwen3" if family == "carried" else family
    ours = build_model(read_checkpoint(written[family]), "ours", FAMILIES[of])
    theirs = AutoModelForCausalLM.from_pretrained(written[family])
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(logits(ours), logits(theirs))
    found = dict(theirs.named_modules())
    count = 0
    for name, module in ours.named_modules():
        if isinstance(module, MXFP4Linear):
            assert found[name].rule == module.rule
            for part, value in module.transform.tensors().items():
                assert torch.equal(value, found[name].transform.tensors()[part])
                assert value.dtype == found[name].transform.tensors()[part].dtype
                count += value.dtype == torch.float64
    assert count or family == "carried"
    assert torch.get_default_dtype() == torch.float32


def test_a_carried_transform_is_no_surprise_to_transformers(
    written: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its matrices are tensors that no module has."""
    AutoModelForCausalLM.from_pretrained(written["carried"])
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_other_checkpoints_of_compressed_tensors_keep_their_quantizer() -> None:
    from transformers import CompressedTensorsConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    stock = quantization_config(own=False, ignore=[], transforms={})
    assert type(AutoQuantizationConfig.from_dict(stock)) is CompressedTensorsConfig
    theirs = {**stock, "transform_config": {"config_groups": {}}}
    assert type(AutoQuantizationConfig.from_dict(theirs)) is CompressedTensorsConfig
    ours = {**theirs, "weights_file": "mxtorq-model.safetensors"}
    assert type(AutoQuantizationConfig.from_dict(ours)) is MxtorqConfig


def test_a_checkpoint_in_many_files(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxtorq.export.checkpoint, "SINGLE_FILE", 0)
    out = quantized("qwen3_moe", tiny_folders["qwen3_moe"], story, tmp_path / "out")
    assert (out / "mxtorq-model.safetensors.index.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(load(out, device="cpu")), logits(theirs))


# Fresh processes: what stands in README.

MXTORQ_FIRST = """
import importlib.machinery, inspect, sys
import mxtorq
assert not {"torch", "transformers"} & set(sys.modules)
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
assert type(auto.__loader__) is type(auto.__spec__.loader) is importlib.machinery.SourceFileLoader
assert "register_quantizer" in inspect.getsource(auto)
assert "mxtorq.loading.checkpoint" not in sys.modules
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found[folder] = model(input_ids=torch.arange(40)[None] % 256).logits
importlib.reload(auto)
assert "mxtorq" in auto.AUTO_QUANTIZER_MAPPING and "mxtorq" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
"""

TRANSFORMERS_FIRST = """
import sys
import torch
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[2:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except OSError as error:
        assert "model.safetensors" in str(error), error
    else:
        raise AssertionError("stock transformers loaded it")
assert not [name for name in sys.modules if name.startswith("mxtorq")]
import mxtorq
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found[folder] = model(input_ids=torch.arange(40)[None] % 256).logits
"""

SAVE = """
from safetensors.torch import save_file
save_file(found, sys.argv[1])
"""


@pytest.mark.parametrize("code", [MXTORQ_FIRST, TRANSFORMERS_FIRST], ids=["mxtorq", "transformers"])
def test_in_a_fresh_process_in_either_order(
    code: str, written: dict[str, Path], tmp_path: Path
) -> None:
    """Without ``import mxtorq`` it stops; with it, first or later, it is the same model."""
    from safetensors.torch import load_file

    folders = [str(folder) for folder in written.values()]
    command = [sys.executable, "-W", "error", "-c", code + SAVE, str(tmp_path / "found"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found")
    for folder in folders:
        assert torch.equal(found[folder], logits(load(folder, device="cpu")))


# The hub: the same files, in its cache.


@pytest.fixture
def cache(written: dict[str, Path], tmp_path: Path) -> Path:
    """A hub cache that holds a checkpoint as the repository someone/llama."""
    repository = tmp_path / "models--someone--llama"
    revision = "0123456789" * 4
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for number, path in enumerate(sorted(written["llama"].iterdir())):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return tmp_path


def test_a_repository_of_the_hub(cache: Path, written: dict[str, Path]) -> None:
    asked = {"dtype": torch.float32, "cache_dir": cache, "local_files_only": True}
    theirs = AutoModelForCausalLM.from_pretrained("someone/llama", **asked)
    assert torch.equal(logits(load(written["llama"], device="cpu")), logits(theirs))


@pytest.mark.parametrize("absent", ["mxtorq.json", "mxtorq-transforms.safetensors"])
def test_a_repository_with_files_that_do_not_come(cache: Path, absent: str) -> None:
    next(cache.glob(f"*/snapshots/*/{absent}")).unlink()
    with pytest.raises(CheckpointError, match="someone/llama\nfound: OSError"):
        AutoModelForCausalLM.from_pretrained(
            "someone/llama", cache_dir=cache, local_files_only=True
        )


def test_a_manifest_on_the_hub_leads_nowhere_else(cache: Path) -> None:
    manifest = next(cache.glob("*/snapshots/*/mxtorq.json"))
    content = json.loads(manifest.read_text())
    content["files"]["../../secret"] = {"sha256": "", "bytes": 0}
    manifest.unlink()
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="secret"):
        AutoModelForCausalLM.from_pretrained(
            "someone/llama", cache_dir=cache, local_files_only=True
        )


# What is refused.


@pytest.mark.parametrize("file", ["mxtorq-model.safetensors", "mxtorq-transforms.safetensors"])
def test_a_changed_file(file: str, changed: Path) -> None:
    content = bytearray((changed / file).read_bytes())
    content[-1] ^= 1
    (changed / file).write_bytes(content)
    with pytest.raises(CheckpointError, match="the manifest says"):
        AutoModelForCausalLM.from_pretrained(changed)


@pytest.mark.parametrize("named", [None, "model.safetensors", "../x.safetensors"])
def test_the_file_with_the_tensors_is_one_of_ours(named: str | None, changed: Path) -> None:
    rewrite(changed, "config.json", lambda c: c["quantization_config"].update(weights_file=named))
    with pytest.raises(CheckpointError, match="weights_file"):
        AutoModelForCausalLM.from_pretrained(changed)


def test_tensors_of_another_model(changed: Path) -> None:
    """What transformers would fill with noise, and merely warn of."""
    rewrite(changed, "config.json", lambda c: c.update(vocab_size=352))
    with pytest.raises(CheckpointError, match=r"embed_tokens.*352"):
        AutoModelForCausalLM.from_pretrained(changed)


def test_other_files_than_the_manifest_describes(written: dict[str, Path]) -> None:
    config = MxtorqConfig(weights_file="mxtorq-model.safetensors.index.json")
    described = SimpleNamespace()
    quantizer = MxtorqQuantizer(config)
    assert quantizer.update_tp_plan(described) is described
    assert described.transformers_weights == "mxtorq-model.safetensors.index.json"
    model = tiny_models.build("llama")
    model.config.name_or_path = str(written["llama"])
    with pytest.raises(CheckpointError, match="variant"):
        quantizer.preprocess_model(model, checkpoint_files=[str(written["llama"] / "x")])
    with pytest.raises(CheckpointError, match="without files"):
        quantizer.preprocess_model(model, checkpoint_files=None)


def test_a_family_of_the_callers_own(changed: Path) -> None:
    rewrite(changed, "mxtorq.json", lambda m: m["source"].update(family="mine"))
    with pytest.raises(CheckpointError, match=r"mxtorq\.load\(path, family=\.\.\.\)"):
        AutoModelForCausalLM.from_pretrained(changed)


def test_another_class(written: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="AutoModelForCausalLM"):
        AutoModel.from_pretrained(written["llama"])


def test_devices_that_it_cannot_be_spread_over() -> None:
    quantizer = MxtorqQuantizer(MxtorqConfig(weights_file="mxtorq-model.safetensors"))
    for fine in (None, "auto", {"": "cpu"}, {"model": 0, "lm_head": 1}):
        quantizer.validate_environment(device_map=fine)
    for spread in ({"model": 0, "lm_head": "cpu"}, {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(UsageError, match="off the accelerator"):
            quantizer.validate_environment(device_map=spread)
    with pytest.raises(UsageError, match="device_map places whole layers"):
        quantizer.update_attn_implementation(SimpleNamespace(distributed_config=object()))


def test_transforms_go_where_the_weights_are(
    written: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no part of the module's state, so transformers does not place them."""
    placed = []
    monkeypatch.setattr(SiteInput, "to_", lambda self, device: placed.append((id(self), device)))
    model = AutoModelForCausalLM.from_pretrained(written["llama"])
    linears = [module for module in model.modules() if isinstance(module, MXFP4Linear)]
    assert len(linears) == 14
    assert set(placed) == {(id(each.input), each.weight_packed.device) for each in linears}


def test_saving_and_quantizing_are_refused(
    written: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(written["llama"])
    with pytest.raises(ValueError, match="mxtorq and is not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            tiny_folders["llama"], quantization_config=MxtorqConfig()
        )


# The hook.


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that stands for transformers' tables, unknown to anybody yet."""
    path = tmp_path / "a_table.py"
    path.write_text(
        "import time\ntime.sleep(0.3)\n"
        "AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, calls = {}, {}, []\n"
        "def register_quantization_config(name):\n"
        "    return lambda kind: AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(name, kind)\n"
        "def register_quantizer(name):\n"
        "    calls.append(name)\n"
        "    return lambda kind: AUTO_QUANTIZER_MAPPING.setdefault(name, kind)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "TABLE", "a_table")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield path
    sys.modules.pop("a_table", None)


def test_a_table_is_met_when_it_is_imported(table: Path) -> None:
    registration.announce()
    registration.announce()
    watching = [f for f in sys.meta_path if isinstance(f, registration._Watch)]
    assert len(watching) == 1
    assert watching[0].find_spec("json", None) is None
    found = importlib.import_module("a_table")
    assert found.calls == ["mxtorq"]
    assert found.AUTO_QUANTIZER_MAPPING["mxtorq"] is MxtorqQuantizer
    assert found.AUTO_QUANTIZATION_CONFIG_MAPPING["mxtorq"] is MxtorqConfig
    assert type(found.__loader__).__name__ == type(found.__spec__.loader).__name__
    assert type(found.__loader__).__module__.startswith(("importlib", "_frozen_importlib"))
    registration.announce()
    assert found.calls == ["mxtorq"]
    importlib.reload(found)
    assert found.AUTO_QUANTIZER_MAPPING["mxtorq"] is MxtorqQuantizer


def test_a_table_that_another_thread_is_importing(table: Path) -> None:
    """It was found before we watched, so it is waited for."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, registration._Watch)]
    thread = threading.Thread(target=importlib.import_module, args=("a_table",))
    thread.start()
    while "a_table" not in sys.modules:
        pass
    registration.announce()
    assert sys.modules["a_table"].calls == ["mxtorq"]
    thread.join()


def test_a_finder_that_asks_all_others_too(table: Path) -> None:
    class Asking:
        def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
            if name != "a_table":
                return None
            others = [finder for finder in sys.meta_path if finder is not self]
            specs = (finder.find_spec(name, path, target) for finder in others)
            return next((spec for spec in specs if spec is not None), None)

    registration.announce()
    sys.meta_path.insert(0, Asking())
    assert importlib.import_module("a_table").calls == ["mxtorq"]
