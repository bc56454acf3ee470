"""The doctor finds what was broken on purpose, and nothing in what is sound."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import alone, here
from mxtorq import pipeline
from mxtorq.config import Recipe, parse_method, parse_scale
from mxtorq.doctor import engines
from mxtorq.doctor.examination import examine
from mxtorq.doctor.subject import open_subject
from mxtorq.errors import CheckpointError
from mxtorq.export.manifest import FILE
from mxtorq.export.targets import Target
from mxtorq.reports.findings import SICK, Diagnosis, Status
from mxtorq.writing import fingerprint

TOKENS = 512
LAYER = "model.layers.0"


def recipe(method: str, story: Path) -> Recipe:
    return Recipe(
        method=parse_method(method), calibration=str(story), calibration_tokens=512, seqlen=64
    )


@pytest.fixture(scope="module")
def sound(
    tiny_folders: dict[str, Path], story: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints of the tiny Qwen3 (without biases) by method, and a stock one with rotations."""
    root = tmp_path_factory.mktemp("sound")
    model = str(tiny_folders["qwen3"])
    for method in ("identity", "hadamard", "wush"):
        pipeline.quantize(model, root / method, recipe(method, story), device="cpu")
    as_stock(root / "hadamard", root / "stock")
    carried = replace(recipe("hadamard", story), target=Target.VLLM_BLACKWELL)
    pipeline.quantize(model, root / "carried", carried, device="cpu")
    return {path.name: path for path in root.iterdir() if path.is_dir()}


def as_stock(ours: Path, out: Path) -> None:
    """A rotated checkpoint as compressed-tensors' transform_config expresses it."""
    tensors = load_file(ours / "mxtorq-model.safetensors")
    rotations = load_file(ours / "mxtorq-transforms.safetensors")
    config = json.loads((ours / "config.json").read_text())
    groups: dict[str, Any] = {}
    sites = json.loads((ours / FILE).read_text())["sites"]
    for number, site in enumerate(sites):
        name = f"r{number}"
        matrix = rotations[f"{site['site']}.rotation"] * 32**0.5
        tensors[f"{site['linears'][0]}.{name}_input.weight"] = matrix.bfloat16()
        groups[name] = {
            "type": "random-hadamard",
            "head_dim": 32,
            "apply": [{"targets": site["linears"], "location": "input", "ignore": []}],
        }
    described = config["quantization_config"]
    described["quant_method"] = "compressed-tensors"
    described["transform_config"] = {"config_groups": groups}
    del described["weights_file"]
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))


def diagnose(folder: Path, tiny_folders: dict[str, Path], story: Path) -> Diagnosis:
    original = str(tiny_folders["qwen3"])
    return examine(folder, original=original, text=str(story), tokens=TOKENS)


@pytest.mark.parametrize("name", ["identity", "hadamard", "wush", "stock", "carried"])
def test_nothing_is_wrong_with_a_sound_checkpoint(
    name: str, sound: dict[str, Path], tiny_folders: dict[str, Path], story: Path
) -> None:
    found = diagnose(sound[name], tiny_folders, story)
    assert found.healthy, found
    assert found.exit_code == 0
    compared = {finding.check: finding.status for finding in found.findings}
    assert compared["weights"] is Status.OK
    assert compared["logits"] is Status.OK
    assert json.loads(found.to_json())["healthy"] is True


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def drop_rotation(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[f"{LAYER}.self_attn.q_proj.r0_input.weight"]


def drop_group(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    drop_rotation(tensors, config)
    del config["quantization_config"]["transform_config"]["config_groups"]["r0"]


def swap_nibbles(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    packed = tensors[f"{LAYER}.mlp.down_proj.weight_packed"]
    packed.copy_((packed << 4) | (packed >> 4))


def shift_scale(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.mlp.down_proj.weight_scale"][3, 1] += 1


def fraction(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    scale = tensors[f"{LAYER}.mlp.down_proj.weight_scale"]
    numbers = torch.exp2(scale.float() - 127)
    numbers[2, 0] *= 1.25
    tensors[f"{LAYER}.mlp.down_proj.weight_scale"] = numbers


def nan_scale(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.mlp.down_proj.weight_scale"][0, 0] = 255


def split_group(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    groups = config["quantization_config"]["transform_config"]["config_groups"]
    groups["r0"]["apply"][0]["targets"] = [f"{LAYER}.self_attn.q_proj"]


def forget_scale(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[f"{LAYER}.mlp.down_proj.weight_scale"]


def unquantize_one(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    path = f"{LAYER}.self_attn.k_proj"
    rows = len(tensors.pop(f"{path}.weight_packed"))
    width = 32 * tensors.pop(f"{path}.weight_scale").shape[1]
    tensors[f"{path}.weight"] = torch.zeros(rows, width, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (drop_rotation, "transforms", "matrix is missing"),
        (drop_group, "weights", "without a rotation"),
        (swap_nibbles, "weights", "swapped nibbles"),
        (shift_scale, "weights", "1 blocks are right with the next scale"),
        (fraction, "scales", "1 scales are no powers of two"),
        (nan_scale, "scales", "255, which is NaN"),
        (split_group, "fused groups", "q_proj"),
        (forget_scale, "shapes", "codes without scales"),
        (unquantize_one, "fused groups", "without the others"),
    ],
)
def test_what_was_broken_is_found(
    change: Change,
    check: str,
    message: str,
    sound: dict[str, Path],
    tiny_folders: dict[str, Path],
    story: Path,
    tmp_path: Path,
) -> None:
    tensors = load_file(sound["stock"] / "model.safetensors")
    config = json.loads((sound["stock"] / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = diagnose(tmp_path, tiny_folders, story)
    wrong = [finding for finding in found.findings if finding.status is Status.WRONG]
    assert any(finding.check == check and message in finding.text for finding in wrong), wrong
    assert found.exit_code == SICK


def test_a_truncated_file_is_refused_or_found(sound: dict[str, Path], tmp_path: Path) -> None:
    for name in ("stock", "wush"):
        folder = Path(shutil.copytree(sound[name], tmp_path / name))
        path = next(folder.glob("*model.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="truncated"):
            examine(folder)
    folder = Path(shutil.copytree(sound["wush"], tmp_path / "again"))
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")
    wrong = [f for f in examine(folder).findings if f.status is Status.WRONG]
    assert [finding.check for finding in wrong] == ["files"]


def test_a_bias_that_was_not_rotated_is_found(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """Rotations of the residual stream change the biases of what writes into it."""
    model = str(tiny_folders["llama"])
    pipeline.quantize(model, tmp_path / "out", recipe("quarot", story), device="cpu")
    healthy = examine(tmp_path / "out", original=model, text=str(story), tokens=TOKENS)
    assert healthy.healthy, healthy
    assert {f.check: f.status for f in healthy.findings}["weights"] is Status.SKIPPED
    path = next((tmp_path / "out").glob("*model.safetensors"))
    tensors = load_file(path)
    plain = load_file(tiny_folders["llama"] / "model.safetensors")
    for name in plain:
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            tensors[name] = 8 * plain[name].bfloat16()
    save_file(tensors, path)
    resign(tmp_path / "out", path.name)
    found = examine(tmp_path / "out", original=model, text=str(story), tokens=TOKENS)
    wrong = [f for f in found.findings if f.status is Status.WRONG]
    assert [finding.check for finding in wrong] == ["logits"]
    assert "bias" in wrong[0].text


def resign(folder: Path, name: str) -> None:
    """Let the manifest say what the file is now."""
    manifest = json.loads((folder / FILE).read_text())
    manifest["files"][name] = fingerprint(folder / name)
    (folder / FILE).write_text(json.dumps(manifest))


def test_a_transform_that_is_gone_is_found(sound: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound["wush"], tmp_path / "out"))
    path = folder / "mxtorq-transforms.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
    resign(folder, path.name)
    wrong = [f for f in examine(folder).findings if f.status is Status.WRONG]
    assert [finding.check for finding in wrong] == ["transforms"]
    assert "missing or not whole" in wrong[0].text


def test_a_carried_matrix_that_is_gone_is_found(sound: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound["carried"], tmp_path / "out"))
    path = folder / "mxtorq-model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.endswith("_input.weight"))]
    save_file(tensors, path)
    resign(folder, path.name)
    wrong = [f.text for f in examine(folder).findings if f.status is Status.WRONG]
    assert any("missing or not whole" in text for text in wrong)
    assert any("its matrix is missing" in text for text in wrong)


def test_the_rule_that_made_the_weights(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    for rule in ("floor", "rceil", "ceil"):
        settings = Recipe(
            method=parse_method("identity"),
            calibration=str(story),
            calibration_tokens=512,
            seqlen=64,
            scale_rule=parse_scale(rule),
        )
        out = tmp_path / rule
        pipeline.quantize(str(tiny_folders["qwen3"]), out, settings, device="cpu")
        texts = {f.check: f.text for f in examine(out).findings}
        assert rule in texts["scale rule"].split(";")[0]
        assert texts["scale rule"].endswith(f"the manifest says {rule}")


def test_engines(sound: dict[str, Path]) -> None:
    def runs(name: str) -> dict[str, str]:
        return {v.engine: v.runs_as for v in engines.verdicts(open_subject(sound[name]))}

    assert runs("wush")["transformers"] == "refused"
    assert runs("wush")["transformers + mxtorq"] == "W4A4"
    assert runs("wush")["vllm-blackwell"] == "refused"
    assert runs("identity")["transformers"] == "W4A4"
    assert runs("identity")["vllm-hopper"] == "W4A16"
    assert runs("stock")["transformers"] == "WRONG"
    assert runs("stock")["vllm-blackwell"] == "W4A4"
    assert runs("carried")["transformers"] == "refused"
    assert runs("carried")["transformers + mxtorq"] == "W4A4"
    assert runs("carried")["vllm-blackwell"] == "W4A4"
    why = {v.engine: v.why for v in engines.verdicts(open_subject(sound["carried"]))}
    assert "made for rceil" in why["vllm-emulation"]
    assert "made for" not in why["vllm-blackwell"]


def test_what_is_no_checkpoint(tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="quant_method"):
        examine(tiny_folders["llama"])


def test_exit_codes_and_the_record(sound: dict[str, Path], tmp_path: Path) -> None:
    record = tmp_path / "diagnosis.json"
    done = here("verify", sound["wush"], "--json", record)
    assert done.returncode == 0, done.stderr
    assert "Nothing is wrong" in done.stdout
    assert json.loads(record.read_text())["schema"] == "mxtorq.diagnosis"
    refused = alone("verify", sound["wush"], "--engine", "vllm-blackwell")
    assert refused.returncode == SICK
    assert "needs the plugin" in refused.stdout
    assert here("verify", tmp_path).returncode == 1
