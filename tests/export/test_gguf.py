"""GGUF files, judged by the gguf package: bytes, values, names, metadata, tokenizers, refusals."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tiny_models
from mxtorq.errors import FormatError, UsageError, VerificationError
from mxtorq.export.convert import export
from mxtorq.export.gguf import from_blocks, interleaved_rows, to_blocks
from mxtorq.export.gguf_architecture import llama3_factors
from mxtorq.export.gguf_vocabulary import EXPRESSIONS, Kind, read_vocabulary
from mxtorq.export.packed import Packed, read_packed
from mxtorq.formats.e2m1 import pack
from mxtorq.formats.mxfp4 import MXFP4, dequantize

gguf: Any = pytest.importorskip("gguf", reason="needs gguf")
MXFP4_TYPE = gguf.GGMLQuantizationType.MXFP4


def test_every_block_means_the_same_to_the_gguf_package() -> None:
    """All 255 scales, and a block in which no two halves are alike."""
    codes = torch.cat((torch.arange(16), torch.arange(16).flip(0) ^ 5)).to(torch.uint8)
    every = MXFP4(
        pack(codes.expand(255, 32).contiguous()), torch.arange(255, dtype=torch.uint8)[:, None]
    )
    blocks = to_blocks(every)
    assert blocks.shape == (255, 17)
    # byte j: element j in the low nibble, element j + 16 in the high one
    assert blocks[7].tolist() == [7, *(int(codes[j] | codes[j + 16] << 4) for j in range(16))]
    with np.errstate(over="ignore"):  # 4 * 2^126 is Inf in both
        values = gguf.quants.dequantize(blocks.numpy(), MXFP4_TYPE)
    assert np.array_equal(values, dequantize(every).numpy())
    for ours, back in zip(every, from_blocks(blocks), strict=True):
        assert torch.equal(ours, back)


def test_nan_is_refused() -> None:
    block = MXFP4(torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([[255]], dtype=torch.uint8))
    with pytest.raises(FormatError, match="255"):
        to_blocks(block)


def test_rows_of_queries_and_keys_become_neighbours() -> None:
    """Rotating halves and reordering is reordering and rotating neighbours."""
    heads, width = 3, 8
    order = interleaved_rows(heads * width, heads)
    assert order[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    x = torch.randn(heads * width, dtype=torch.float64)
    cos, sin = torch.rand(2, width // 2, dtype=torch.float64)
    first, second = x.view(heads, 2, -1).unbind(1)
    halves = torch.stack((first * cos - second * sin, second * cos + first * sin), 1).flatten()
    even, odd = x[order].view(heads, -1, 2).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten()
    assert torch.equal(halves[order], pairs)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.o_proj": "attn_output",
    "mlp.down_proj": "ffn_down",
    "mlp.experts.{}.up_proj": "ffn_up_exps",
}


def fields(path: Path) -> dict[str, Any]:
    return {n: field.contents() for n, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("family", list(tiny_models.CONFIGS))
def test_files_hold_what_checkpoints_hold(
    quantized: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    out = tmp_path / "model.gguf"
    model = read_packed(quantized(family))
    done = export(model.folder, out, "gguf", without_tokenizer=True)
    assert list(done.files) == ["model.gguf"]
    assert "W4A8" in done.notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    heads = {"q_proj": 4, "k_proj": 2} if family in ("llama", "mistral") else {}
    for path, name in NAMES.items():
        found = tensors.get(f"blk.1.{name}.weight")
        if found is None:
            continue
        assert found.tensor_type == MXFP4_TYPE
        for number in range(4 if "{}" in path else 1):
            linear = f"model.layers.1.{path.format(number)}"
            rows = found.data[number] if "{}" in path else found.data
            values = dequantize(model.codes(linear))
            kind = linear.rpartition(".")[2]
            if kind in heads:
                values = values[interleaved_rows(len(values), heads[kind])]
            assert np.array_equal(gguf.quants.dequantize(np.array(rows), MXFP4_TYPE), values)
    embedding = torch.from_numpy(np.array(tensors["token_embd.weight"].data)).view(torch.bfloat16)
    assert torch.equal(embedding, model.shards.tensor("model.embed_tokens.weight"))
    norm = tensors["output_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    assert ("output.weight" in tensors) == (not model.config["tie_word_embeddings"])
    quantized_ones = [t for t in tensors.values() if t.tensor_type == MXFP4_TYPE]
    assert len(quantized_ones) == 2 * 7
    said = fields(out)
    arch = {"mistral": "llama", "qwen3_moe": "qwen3moe"}.get(family, family)
    assert said["general.architecture"] == arch
    expected = {
        "block_count": 2,
        "embedding_length": 64,
        "context_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": tiny_models.HEAD_DIM[family],
        "rope.dimension_count": tiny_models.HEAD_DIM[family],
        "rope.freq_base": 10_000.0,
        "vocab_size": 320,
    }
    if family == "qwen3_moe":
        expected |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96}
    else:
        expected["feed_forward_length"] = 96
    assert {key: said[f"{arch}.{key}"] for key in expected} == expected
    assert said["tokenizer.ggml.model"] == "no_vocab"


def at_rest(quantized: Callable[..., Path], family: str = "llama", **changes: Any) -> Packed:
    model = read_packed(quantized(family))
    model.config.update(changes)
    return model


def test_positions_of_llama_3_are_those_of_transformers(quantized: Callable[..., Path]) -> None:
    changes = {**tiny_models.LLAMA_32, "head_dim": 64}
    config = type(tiny_models.CONFIGS["llama"])(
        **{**tiny_models.CONFIGS["llama"].to_dict(), **changes}
    )
    theirs = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    factors = llama3_factors(at_rest(quantized, **changes))
    assert factors is not None
    plain = 10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    # A float32 power, then some ten roundings of 2^-24 each in either computation.
    assert torch.allclose(
        plain / torch.from_numpy(factors).double(), theirs.double(), rtol=2**-18, atol=0
    )
    assert set(np.round(factors, 5)) >= {1.0, 4.0}
    assert llama3_factors(at_rest(quantized)) is None


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"sliding_window": 64}, "sliding"),
        ({"partial_rotary_factor": 0.5}, "a part of a head"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8}}, "beta_fast"),
        ({"rope_parameters": [1]}, "rescaled"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "factor = 'x'"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"num_attention_heads": 5}, "no 5 heads"),
        ({"model_type": "qwen3"}, "biases of"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    quantized: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    folder = stock(quantized("llama"), tmp_path / "stock")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UsageError, match=found):
        export(folder, tmp_path / "m.gguf", "gguf", without_tokenizer=True)
    assert not (tmp_path / "m.gguf").exists()


def stock(source: Path, folder: Path) -> Path:
    export(source, folder, "compressed-tensors")
    return folder


def test_rescaled_positions_have_keys(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = stock(quantized("llama"), tmp_path / "stock")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    path.write_text(json.dumps(config))
    export(folder, tmp_path / "m.gguf", "gguf", without_tokenizer=True)
    said = fields(tmp_path / "m.gguf")
    assert said["llama.rope.scaling.type"] == "yarn"
    assert said["llama.rope.scaling.factor"] == 4.0
    assert said["llama.rope.scaling.original_context_length"] == 32


def test_transforms_are_refused_with_the_methods_that_have_none(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    source = quantized("qwen3", "hadamard")
    with pytest.raises(UsageError, match="8 of 8 inputs with a transform") as caught:
        export(source, tmp_path / "m.gguf", "gguf")
    assert "identity, and smoothquant" in caught.value.why
    merged = quantized("qwen3", "smoothquant")
    export(merged, tmp_path / "m.gguf", "gguf", without_tokenizer=True)


def test_a_file_that_is_not_as_written_does_not_appear(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gguf.GGUFWriter.write_tensor_data

    def flipped(self: Any, tensor: Any) -> None:
        tensor = tensor.copy()
        tensor.view(np.uint8).reshape(-1)[5] ^= 1
        original(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", flipped)
    with pytest.raises(VerificationError, match="not what was written"):
        export(quantized("llama"), tmp_path / "m.gguf", "gguf", without_tokenizer=True)
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_extra_is_named(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"mxtorq\[gguf\]"):
        export(quantized("llama"), tmp_path / "m.gguf", "gguf")


# Tokenizers. That llama.cpp gives the same tokens for the files was checked by running it.

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def tokenizer(folder: Path, **changes: Any) -> Path:
    content = {
        "added_tokens": [
            {"id": 3, "content": "<s>", "special": True},
            {"id": 4, "content": "<tool>", "special": False},
        ],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
        },
        **changes,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "chat_template": "{{ x }}"})
    )
    return folder


def test_byte_level_vocabularies(tmp_path: Path) -> None:
    for text, name in [*EXPRESSIONS.items(), (None, "gpt-2")]:
        pre: dict[str, Any] = {**BYTES, "use_regex": True}
        if text is not None:
            split = {**SPLIT, "pattern": {"Regex": text}}
            pre = {"type": "Sequence", "pretokenizers": [split, BYTES]}
        found = read_vocabulary(tokenizer(tmp_path, pre_tokenizer=pre), {"eos_token_id": [2, 1]}, 6)
        assert (found.model, found.pre) == ("gpt2", name)
    assert found.tokens == ["a", "b", "ab", "<s>", "<tool>", "[PAD5]"]
    kinds = [Kind.NORMAL, Kind.NORMAL, Kind.NORMAL, Kind.CONTROL, Kind.USER_DEFINED, Kind.UNUSED]
    assert found.kinds == kinds
    assert found.merges == ["a b"]
    assert found.special == {"bos": 3, "eos": 2}
    assert found.adds == {"bos": True, "eos": False}
    assert found.chat_template == "{{ x }}"


def test_sentencepiece_vocabularies(tmp_path: Path) -> None:
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "vocab": {"<unk>": 0, "<0x41>": 1, "a": 2, "b": 3, "ab": 4, "abb": 5},
        "merges": ["a b", "ab b"],
    }
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "content": "▁"}]
    normalizer = {"type": "Sequence", "normalizers": steps}
    folder = tokenizer(
        tmp_path, model=model, normalizer=normalizer, pre_tokenizer=None, added_tokens=[]
    )
    found = read_vocabulary(folder, {}, 6)
    assert found.model == "llama"
    assert found.kinds[:3] == [Kind.UNKNOWN, Kind.BYTE, Kind.NORMAL]
    assert found.scores is not None
    assert found.scores[4] > found.scores[5] > found.scores[2]
    assert found.adds["space"]
    model["merges"] = ["a b", "ab b", "a b"]
    with pytest.raises(UsageError, match="one behind the other"):
        read_vocabulary(tokenizer(tmp_path, model=model, normalizer=normalizer), {}, 6)
    with pytest.raises(UsageError, match="spaces that stay"):
        read_vocabulary(tokenizer(tmp_path, model=model), {}, 6)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts text"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{**SPLIT, "pattern": {"Regex": "x"}}, BYTES],
                }
            },
            "under none of the names",
        ),
        ({"model": {"type": "Unigram"}}, "Unigram"),
        ({"model": {"type": "BPE", "vocab": {"a": 9}, "merges": []}}, "rows of the embedding"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}}, "no pairs"),
        ({"added_tokens": [{"id": "x"}]}, "added token"),
        ({"added_tokens": 1.5}, "added_tokens = 1.5"),
        ({"post_processor": {"single": [1.5]}, "pre_tokenizer": {"pretokenizers": 2}}, "cuts text"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(UsageError, match=found) as caught:
        read_vocabulary(tokenizer(tmp_path, **changes), {}, 6)
    assert "--without-tokenizer" in caught.value.todo


def test_the_tokenizer_goes_into_the_file(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = stock(quantized("qwen3"), tmp_path / "stock")
    with pytest.raises(UsageError, match="cuts text"):  # the tiny tokenizer does not cut at all
        export(folder, tmp_path / "m.gguf", "gguf")
    shutil.copy(tokenizer(tmp_path) / "tokenizer.json", folder / "tokenizer.json")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {**BYTES, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    export(folder, tmp_path / "m.gguf", "gguf")
    said = fields(tmp_path / "m.gguf")
    assert said["tokenizer.ggml.tokens"][:3] == ["a", "b", "ab"]
    assert len(said["tokenizer.ggml.tokens"]) == 320
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.ggml.merges"] == ["a b"]
    assert said["tokenizer.ggml.bos_token_id"] == 3
