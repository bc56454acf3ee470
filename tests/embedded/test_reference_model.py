"""The model inside the package: what was promised of it, and the whole path on it."""

import json
import platform
from importlib.resources import files

import pytest
import torch

from mxtorq import pipeline
from mxtorq.comparison import compare
from mxtorq.config import EvaluationPlan, Recipe, parse_method
from mxtorq.loading.source import REFERENCE, load_source

FOLDER = files("mxtorq.embedded") / "model"


def test_it_is_small_and_has_what_makes_qwen3_hard() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["hidden_size"] >= 256
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    with (FOLDER / "model.safetensors").open("rb") as file:
        assert len(file.read()) <= 16_000_000


def test_its_weights_are_bfloat16_and_finite() -> None:
    source = load_source(REFERENCE, torch.device("cpu"))
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, tensor.bfloat16().float()), name


def test_its_tokenizer_gives_every_text_back() -> None:
    tokenizer = load_source(REFERENCE, torch.device("cpu")).tokenizer
    text = 'def f(x):\n\treturn "é漢🙂"  # 12,345\r\n'
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id is not None


def test_outliers_change_no_bit_of_the_baseline_and_hurt_direct_rounding() -> None:
    plan = EvaluationPlan(eval_tokens=4096)
    rows = {}
    for outliers in (None, "qwen3-0.6b"):
        recipes = [
            Recipe(method=parse_method(m), calibration_tokens=2048, outliers=outliers)
            for m in ("identity", "hadamard")
        ]
        results = compare(REFERENCE, recipes, plan, device="cpu")
        rows.update({(outliers, row.method): row.perplexity for row in results.rows})
    assert rows[None, "bf16"] == rows["qwen3-0.6b", "bf16"]
    assert rows[None, "bf16"] < 100  # a uniform guess would be 4096
    assert rows["qwen3-0.6b", "identity"] > rows[None, "identity"]
    assert min(rows.values()) == rows[None, "bf16"]


def test_its_training_is_on_record() -> None:
    record = json.loads((FOLDER / "training.json").read_text())
    assert record["parameters"] == sum(
        p.numel() for p in load_source(REFERENCE, torch.device("cpu")).model.parameters()
    )
    if platform.python_version() != record["python"]:
        pytest.skip("the evaluation text is another Python's, and so would be the figure")
    row = pipeline.evaluate(REFERENCE, EvaluationPlan(seqlen=record["context"]), device="cpu").rows[
        0
    ]
    # rounded to four places, and summed in another order
    assert abs(row.perplexity - record["evaluation_perplexity_bf16"]) <= 1e-4 * row.perplexity
