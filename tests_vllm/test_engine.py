"""vLLM computes what `mxtorq.load` computes, by the log-probabilities of the same tokens.

The bound. In float32 both sides do the same roundings to MXFP4, and differ in the order of sums of
attention, norms and head: sums of at most a thousand terms, so 1e3 * 2^-24 = 6e-5 of a logit's
size, which `NOISE` exceeds. That holds for a token unless an activation before it lies within that
noise of a rounding boundary; then a code differs, and what follows differs at the scale of
quantization itself. So the demand is on the share of tokens within `NOISE`, most, and on the mean,
which must stay well below that of a small mistake: the other scale rule on the same checkpoint. The
control is computed in the same test, and must itself fail the first demand.

In bfloat16 codes differ everywhere; the demand is that the engine's bfloat16 be no farther from our
bfloat16 than twice what our bfloat16 is from our float32.
"""

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxtorq
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.surgery.linear import MXFP4Linear, round_inputs_by_
from vllm_engine import Scored, StartError, serve

NOISE = 1e-4
"""Nats."""
PROMPTS, PROMPT, NEW = 16, 8, 8
"""Short texts: a code that differs changes the rest of its text only."""


class Case(NamedTuple):
    model: str
    method: str
    rule: str = "floor"
    target: str = "mxtorq"
    dtype: str = "float32"
    ranks: int = 1
    options: tuple[str, ...] = ("--enforce-eager",)


OURS = ("--enforce-eager", "--quantization", "mxtorq")
"""Our method for a checkpoint that vLLM would take as compressed-tensors'."""

CASES = [
    Case("reference", "none"),
    Case("reference", "identity"),
    Case("reference", "torq"),
    Case("reference", "duquant++:steps=8"),
    Case("reference", "wush"),
    Case("reference", "smoothquant"),
    Case("reference", "quarot"),
    Case("reference", "duquant:steps=8:block=32"),
    Case("reference", "perq"),
    Case("reference", "brq"),
    Case("reference", "spinquant:steps=2"),
    Case("reference", "hires"),
    Case("reference", "mxtorq"),
    Case("llama", "mxtorq", ranks=2),
    Case("reference", "mxtorq", target="vllm-emulation", dtype="bfloat16"),
    Case("reference", "hadamard", rule="even"),
    Case("reference", "identity", rule="rceil"),
    Case("reference", "identity", options=OURS),
    Case("reference", "torq", options=()),
    Case("llama", "torq"),
    Case("qwen3", "torq"),
    Case("qwen3", "wush"),
    Case("qwen3", "torq", ranks=2),
    Case("qwen2", "torq"),
    Case("mistral", "wush"),
    Case("llama", "torq", ranks=2),
    Case("llama", "wush", ranks=2),
    Case("llama", "identity", ranks=2),
    Case("reference", "none", dtype="bfloat16"),
    Case("reference", "torq", dtype="bfloat16"),
    Case("reference", "hadamard", target="vllm-blackwell", dtype="bfloat16"),
    Case("qwen3", "torq:levels=intra", target="vllm-emulation", dtype="bfloat16"),
    Case("reference", "hadamard", target="vllm-blackwell", options=OURS),
    Case("qwen3", "hadamard", target="vllm-emulation", ranks=2, options=OURS),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:6])))
def test_log_probabilities_are_ours(
    case: Case, folders: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    plain = case.method == "none"
    folder = folders.model(case.model) if plain else folders.checkpoint(*case[:4])
    parallel = ("--tensor-parallel-size", str(case.ranks), "--dtype", case.dtype)
    with serve(folder, tmp_path / "log", *parallel, *case.options) as engine:
        scored = engine.score(prompts(folder), NEW)
    load = AutoModelForCausalLM.from_pretrained if plain else mxtorq.load
    model = load(folder).to(getattr(torch, case.dtype))
    ours = log_probabilities(model, scored)
    theirs = torch.tensor([each.log_probabilities for each in scored])
    differences = (ours - theirs).abs().flatten()
    if case.dtype == "bfloat16":
        control = (log_probabilities(load(folder).float(), scored) - ours).abs().flatten()
    else:
        control = None if plain else (with_other_rule(model, scored) - ours).abs()
    rows.append(
        {
            **case._asdict(),
            "options": " ".join(case.options) or "(compiled)",
            "tokens": differences.numel(),
            "within": share(differences),
            "median": statistics.median(differences.tolist()),
            "mean": differences.mean().item(),
            "max": differences.max().item(),
            "control": None if control is None else control.mean().item(),
        }
    )
    if case.dtype == "bfloat16":
        assert control is not None
        assert differences.mean() <= 2 * control.mean()
    elif plain:
        assert differences.max() <= NOISE
    else:
        assert control is not None
        assert share(control.flatten()) < 0.1, "the control does not see another scale rule"
        assert share(differences) > 0.5
        assert differences.mean() < control.mean() / 2


def test_registering_twice_changes_nothing() -> None:
    program = (
        "from mxtorq.serving.vllm.plugin import register\n"
        "from vllm.model_executor.kernels.linear import _POSSIBLE_MXFP4_KERNELS as kernels\n"
        "register()\nfirst = {key: list(value) for key, value in kernels.items()}\n"
        "register()\nassert first == kernels\nassert 'Mxtorq' in str(kernels)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_the_plugin_a_rotated_checkpoint_is_refused(folders: Any, tmp_path: Path) -> None:
    folder = folders.checkpoint("llama", "torq", "floor")
    with (
        pytest.raises(StartError, match="Unknown quantization method: mxtorq"),
        serve(folder, tmp_path / "log", plugins="none"),
    ):
        pass


def test_experts_are_refused(folders: Any, tmp_path: Path) -> None:
    folder = folders.checkpoint("qwen3_moe", "torq", "floor")
    with (
        pytest.raises(StartError, match="MXFP4 experts of an mxtorq checkpoint"),
        serve(folder, tmp_path / "log", "--dtype", "float32"),
    ):
        pass


def test_a_damaged_checkpoint_is_refused(folders: Any, tmp_path: Path) -> None:
    folder = folders.checkpoint("llama", "torq", "floor")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    path = copy / "mxtorq-transforms.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with (
        pytest.raises(StartError, match="missing, truncated, changed"),
        serve(copy, tmp_path / "log"),
    ):
        pass


def prompts(folder: Path) -> list[list[int]]:
    """The beginnings of lines of a text, in the model's tokens."""
    text = Path(__file__).read_text(encoding="utf-8")
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return [ids[at * PROMPT : (at + 1) * PROMPT] for at in range(PROMPTS)]


@torch.inference_mode()
def log_probabilities(model: Any, scored: list[Scored]) -> Tensor:
    """Ours of each token but the first, [prompts, tokens - 1]."""
    ids = torch.tensor([each.tokens for each in scored])
    rows = [model(row[None]).logits[0, :-1].float().log_softmax(-1) for row in ids]
    return torch.stack(rows).gather(-1, ids[:, 1:, None])[..., 0]


def with_other_rule(model: Any, scored: list[Scored]) -> Tensor:
    """Ours if activations were rounded by another rule than the checkpoint says."""
    rule = next(each.rule for each in model.modules() if isinstance(each, MXFP4Linear))
    round_inputs_by_(model, ScaleRule.EVEN if rule is ScaleRule.FLOOR else ScaleRule.FLOOR)
    return log_probabilities(model, scored)


def share(differences: Tensor) -> float:
    return (differences <= NOISE).double().mean().item()
