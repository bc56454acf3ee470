"""A configuration is JSON that brings no code and promises what the tensors can hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from mxtorq.errors import ModelError
from mxtorq.reading.configuration import LONGEST, read_configuration, require_plausible
from mxtorq.reading.documents import Refusal

REFUSE = Refusal(kind=ModelError, asked="a model", why="it is odd", todo="download it again")
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def read(tmp_path: Path, **changes: object) -> dict[str, Any]:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA_8B, **changes}))
    return read_configuration(path, REFUSE)


def test_a_usual_one(tmp_path: Path) -> None:
    assert read(tmp_path) == LLAMA_8B
    assert read(tmp_path, auto_map=None, attn_implementation="sdpa")
    require_plausible(LLAMA_8B, 291, 16_060_522_496, REFUSE)
    require_plausible(LLAMA_8B, 291 + 224, 5_500_000_000, REFUSE)  # as MXFP4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "trust_remote_code is off"),
        ({"text_config": {"auto_map": {"AutoConfig": "x"}}}, "trust_remote_code is off"),
        ({"deep": [{"er": {"auto_map": "x"}}]}, "trust_remote_code is off"),
        ({"attn_implementation": "some/kernel"}, "code on the hub"),
        ({"_attn_implementation": {"": "some/kernel"}}, "code on the hub"),
        ({"model_type": None}, "model_type says"),
        ({"model_type": ""}, "model_type says"),
        ({"model_type": 5}, "model_type says"),
        ({"model_type": "l" * 10_000}, "model_type says"),
        ({"architectures": "x"}, "architectures is of type"),
        ({"layer_types": [["x"]]}, "layer_types is of type"),
        ({"quantization_config": "gptq"}, "quantization_config is of type"),
        ({"num_hidden_layers": 10**9}, "as many layers"),
        ({"text_config": {"num_hidden_layers": 10**400}}, "as many layers"),
    ],
)
def test_odd_ones_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, **changes)


def test_size_and_depth_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ("[]", '"x"', '{"a":' * 10_000, " " * (LONGEST + 1)):
        path.write_text(text)
        with pytest.raises(ModelError):
            read_configuration(path, REFUSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "a layer has at least one tensor"),
        ({"vocab_size": 10**8}, "the embedding"),
        ({"hidden_size": 10**6}, "the embedding"),
        ({"intermediate_size": 10**7}, "the MLPs"),
        ({"head_dim": 10**5}, "the attention"),
        ({"num_attention_heads": 10**6}, "the attention"),
        ({"num_key_value_heads": 10**6}, "the attention"),
        ({"num_local_experts": 10**4}, "the experts"),
        ({"text_config": {"vocab_size": 10**12}}, "the embedding"),
        ({"hidden_size": 0}, "positive integers"),
        ({"hidden_size": "4096"}, "positive integers"),
        ({"hidden_size": True}, "positive integers"),
        ({"num_attention_heads": -1}, "positive integers"),
        ({"max_position_embeddings": 10**30}, "positive integers"),
    ],
)
def test_sizes_that_the_tensors_cannot_fill(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        require_plausible({**LLAMA_8B, **changes}, 291, 16_060_522_496, REFUSE)
