"""A GGUF file with MXFP4 weights (type 39), for llama.cpp and what is built on it.

    17 bytes for 32 weights:   byte 0         the E8M0 scale
                               byte 1 + j     element j (low nibble), element j + 16 (high nibble)

Codes and scales are those of the checkpoint in another order; nothing is rounded again. llama.cpp
decodes the doubled integer elements times 2^(byte - 128), which is 2^(byte - 127) times the element
for bytes 0 to 254 (checked for each). Byte 255, NaN by OCP, would be a number there and is refused;
-0 becomes 0. The other matrices stay as they are, vectors become float32, as llama.cpp wants them.

llama.cpp's ``llama`` (also of Mistral) rotates neighbours (2i, 2i + 1) where transformers rotates
(i, i + d/2): the rows of q and k are put in that order, head by head. A row holds whole MX blocks,
so that only moves bytes. Experts of a projection become one tensor.

What it is not: W4A4. llama.cpp's CPU product rounds inputs to 8 bits in blocks of 32 (Q8_0), so its
figures are those of W4A8, and inputs cannot be transformed: only models whose transforms are merged
are written. Sources: gguf 0.19 (``quants.MXFP4``, ``tensor_mapping``), llama.cpp's loader.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from mxtorq.errors import FormatError, UsageError, VerificationError
from mxtorq.export.gguf_architecture import (
    Plan,
    describe,
    inexpressible,
    llama3_factors,
    plan_of,
    size_of,
)
from mxtorq.export.gguf_vocabulary import Vocabulary, read_vocabulary
from mxtorq.export.layouts import Progress, require_merged
from mxtorq.export.packed import Group, Packed
from mxtorq.formats import e2m1
from mxtorq.formats.mxfp4 import MXFP4, dequantize
from mxtorq.formats.spec import BLOCK, E8M0_NAN

_HALF = BLOCK // 2
_BYTES = 1 + _HALF  # of a block
_FACTORS = "rope_freqs.weight"
_CHECKED_ROWS = 64
"""Rows of each tensor that the gguf package dequantizes for the check of the values."""


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A tensor of the file: a linear, the same linear of all experts, or what is kept."""

    name: str
    sources: list[str]
    heads: int
    """Heads whose rows are put in another order; 0 for none."""
    quantized: bool
    stacked: bool


def to_blocks(codes: MXFP4) -> UInt8[Tensor, "*rows bytes"]:
    """Our packed codes and scales as GGUF's blocks of 17 bytes.

    Raises:
        FormatError: a scale byte is 255, which llama.cpp reads as a number.
    """
    if bool((codes.e8m0 == E8M0_NAN).any()):
        raise FormatError(
            asked="MXFP4 weights in GGUF",
            found="a scale byte of 255 (NaN)",
            why="llama.cpp would read it as 2^128",
            todo="quantize again from undamaged weights",
        )
    elements = e2m1.unpack(codes.packed).unflatten(-1, (-1, BLOCK))
    nibbles = elements[..., :_HALF] | elements[..., _HALF:] << 4
    return torch.cat((codes.e8m0[..., None], nibbles), -1).flatten(-2)


def from_blocks(blocks: UInt8[Tensor, "*rows bytes"]) -> MXFP4:
    """The inverse of `to_blocks`."""
    parts = blocks.unflatten(-1, (-1, _BYTES))
    nibbles = parts[..., 1:]
    elements = torch.cat((nibbles & 0x0F, nibbles >> 4), -1)
    return MXFP4(e2m1.pack(elements.flatten(-2)), parts[..., 0].contiguous())


def interleaved_rows(rows: int, heads: int) -> Tensor:
    """Where each row of a q or k projection comes from: (half, i) of a head becomes (i, half)."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def write_gguf(
    model: Packed, path: Path, progress: Progress, *, without_tokenizer: bool = False
) -> list[str]:
    """Write a model as one GGUF file and read it back; returns what to know of it.

    Args:
        model: read by `read_packed`.
        path: of the file, which does not exist.
        progress: told (tensors done, tensors in all), twice over.
        without_tokenizer: leave the tokenizer out, so that the file takes token ids alone.

    Raises:
        UsageError: GGUF or llama.cpp cannot say what the model is.
        FormatError: a scale is NaN.
        VerificationError: what was read back differs.
    """
    gguf = _library()
    require_merged(model, "a GGUF file")
    plan = plan_of(model)
    config = model.config
    size = model.shards.entry("model.embed_tokens.weight").shape[0]
    vocabulary = None if without_tokenizer else read_vocabulary(model.folder, config, size)
    items = list(_items(model, plan, gguf))
    arch = getattr(gguf.MODEL_ARCH, plan.architecture)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    notes = _notes(model, vocabulary)
    describe(writer, model, size, notes, gguf)
    _add_vocabulary(writer, vocabulary)
    factors = llama3_factors(model)
    if factors is not None:
        writer.add_tensor_info(_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for item in items:
        kind, dtype, shape, nbytes = _stored_as(model, item, gguf)
        writer.add_tensor_info(item.name, shape, np.dtype(dtype), nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for number, item in enumerate(items):
            progress(number, 2 * len(items))
            writer.write_tensor_data(_values(model, item))
    finally:
        writer.close()
    _verify(model, path, items, lambda done: progress(len(items) + done, 2 * len(items)), gguf)
    return notes


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            asked="a GGUF file",
            found="no package gguf",
            why="the file is written and read back with it",
            todo="pip install 'mxtorq[gguf]'",
        ) from error
    return gguf


def _items(model: Packed, plan: Plan, gguf: Any) -> Iterator[_Item]:
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, plan.architecture), size_of(model, "num_hidden_layers")
    )
    heads = {
        "q_proj": size_of(model, "num_attention_heads"),
        "k_proj": size_of(model, "num_key_value_heads", "num_attention_heads"),
    }
    for group in model.groups():
        for sources, name, quantized in _gathered(group):
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise inexpressible(model, f"the tensor {name}, for which llama.cpp has no name")
            count = heads.get(name.split(".")[-2], 0) if plan.interleaved else 0
            stored = model.linears[sources[0]][0] if quantized else sources[0]
            if count and model.shards.entry(stored).shape[0] % (2 * count):
                raise inexpressible(model, f"{name}, whose rows are no {count} heads")
            yield _Item(
                name=found,
                sources=sources,
                heads=count,
                quantized=quantized,
                stacked=sources[0] != name and sources[0] != name.removesuffix(".weight"),
            )


def _gathered(group: Group) -> Iterator[tuple[list[str], str, bool]]:
    """(sources, name as of one linear, quantized) of a group; experts' linears together."""
    stacks: dict[tuple[str, bool], dict[int, str]] = {}
    for quantized, members in ((True, group.linears), (False, group.plain)):
        for member in members:
            name = f"{member}.weight" if quantized else member
            before, _, after = name.partition(".experts.")
            number, _, rest = after.partition(".")
            if not number.isdecimal():
                yield [member], name, quantized
                continue
            stacks.setdefault((f"{before}.experts.{rest}", quantized), {})[int(number)] = member
    for (name, quantized), found in stacks.items():
        yield [found[number] for number in sorted(found)], name, quantized


def _stored_as(model: Packed, item: _Item, gguf: Any) -> tuple[Any, Any, tuple[int, ...], int]:
    """GGUF type, NumPy type, shape in these elements, and bytes of a tensor."""
    types = gguf.GGMLQuantizationType
    count = (len(item.sources),) if item.stacked else ()
    if item.quantized:
        rows, half = model.shards.entry(model.linears[item.sources[0]][0]).shape
        shape = (*count, rows, half // _HALF * _BYTES)
        return types.MXFP4, np.uint8, shape, math.prod(shape)
    entry = model.shards.entry(item.sources[0])
    shape = (*count, *entry.shape)
    if (
        len(entry.shape) == 1
        or entry.dtype == torch.float32
        or item.name.endswith("gate_inp.weight")
    ):
        return types.F32, np.float32, shape, 4 * math.prod(shape)
    if entry.dtype == torch.float16:
        return types.F16, np.float16, shape, 2 * math.prod(shape)
    shape = (*shape[:-1], 2 * shape[-1])
    return types.BF16, np.uint8, shape, math.prod(shape)


def _values(model: Packed, item: _Item) -> Shaped[np.ndarray, "..."]:
    """The elements that the file holds."""
    parts = [_part(model, item, source) for source in item.sources]
    whole = torch.stack(parts) if item.stacked else parts[0]
    if whole.dtype == torch.bfloat16:
        whole = whole.contiguous().view(torch.uint8)
    return whole.contiguous().numpy()


def _part(model: Packed, item: _Item, source: str) -> Tensor:
    if item.quantized:
        values = to_blocks(model.codes(source))
    else:
        values = model.shards.tensor(source)
        if values.dim() == 1 or item.name.endswith("gate_inp.weight"):
            values = values.float()
    return values[interleaved_rows(len(values), item.heads)] if item.heads else values


def _verify(
    model: Packed, path: Path, items: list[_Item], progress: Callable[[int], None], gguf: Any
) -> None:
    """Compare a file, as the gguf package reads it, with the codes and tensors of its source."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    strange = (set(found) ^ {item.name for item in items}) - {_FACTORS}
    if strange:
        raise _differs(path, f"the list of tensors ({sorted(strange)[:3]})")
    for number, item in enumerate(items):
        progress(number)
        data = found[item.name].data
        if not np.array_equal(data, _values(model, item)):
            raise _differs(path, item.name)
        if item.quantized:
            _verify_codes(model, path, item, data, gguf)
    progress(len(items))


def _verify_codes(model: Packed, path: Path, item: _Item, data: Any, gguf: Any) -> None:
    """The way back: the same codes bit for bit, and the values that gguf makes of them."""
    stacked = data if item.stacked else data[None]
    for source, blocks in zip(item.sources, stacked, strict=True):
        back = from_blocks(torch.from_numpy(np.array(blocks)))
        if item.heads:
            order = torch.argsort(interleaved_rows(len(back.packed), item.heads))
            back = MXFP4(back.packed[order], back.e8m0[order])
        codes = model.codes(source)
        if not all(torch.equal(a, b) for a, b in zip(back, codes, strict=True)):
            raise _differs(path, item.name)
        some = np.array(blocks[:_CHECKED_ROWS])
        values = gguf.quants.dequantize(some, gguf.GGMLQuantizationType.MXFP4)
        ours = dequantize(from_blocks(torch.from_numpy(some)))
        if not np.array_equal(values, ours.numpy()):
            raise _differs(path, f"{item.name}, dequantized by the gguf package,")


def _add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    for name, value in vocabulary.adds.items():
        method = {"bos": "add_add_bos_token", "eos": "add_add_eos_token"}
        getattr(writer, method.get(name, "add_add_space_prefix"))(value)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _notes(model: Packed, vocabulary: Vocabulary | None) -> list[str]:
    notes = [
        "Weights are the checkpoint's MXFP4 codes and scales. llama.cpp's CPU product rounds "
        "inputs to 8 bits (W4A8): its figures are not those of W4A4."
    ]
    if vocabulary is None:
        notes.append("Without a tokenizer: it takes and gives token ids.")
    return notes


def _differs(path: Path, what: str) -> VerificationError:
    return VerificationError(
        asked=f"the GGUF file {path.name}, read back",
        found=f"{what} is not what was written",
        why="the same codes and tensors give the same bytes",
        todo="look after the disk, and run the same command again; report it if it stays",
    )
