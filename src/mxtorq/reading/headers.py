"""The header of a safetensors file: which tensors lie where. Checked in full, without its data.

    8 bytes          N, little endian
    N bytes          a JSON object: {"name": {"dtype": "BF16", "shape": [2, 3],
                     "data_offsets": [0, 12]}, ..., "__metadata__": {"key": "text"}}
    the rest         the data; offsets count from its first byte

A header is true when every byte range is as long as dtype and shape say, ranges do not overlap, and
together they cover the data without a hole, which is what the format demands
(huggingface/safetensors, "Format"). So the sizes in a header can promise no more than the file has.

Stricter than the library: it takes headers of up to 100 MB, which as Python objects would occupy
two gigabytes; 32 MB are some two hundred thousand tensors. Types that torch has no byte for (F4,
F6) are refused.
"""

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mxtorq.reading.documents import Refusal, parse_object

LONGEST = 32 * 2**20
"""Bytes of a header."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

_METADATA = "__metadata__"
_LARGEST = 2**63 - 1
_MOST_AXES = 64  # what torch has


class Stamp(NamedTuple):
    """Which file it was, to notice when another one has taken its place."""

    device: int
    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int
    """Its first byte, counted from the beginning of the file."""
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_header(path: Path, refuse: Refusal) -> tuple[dict[str, Entry], Stamp]:
    """The tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        MxtorqError: it is none, or its header and its data do not agree.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise refuse(f"{path.name}, which is no regular file")
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if length > min(LONGEST, facts.st_size - 8):
                raise refuse(
                    f"{path.name}: a header of {length} bytes in a file of {facts.st_size}",
                    f"a header lies within its file and has up to {LONGEST} bytes",
                )
            text = file.read(length).decode("utf-8")
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise refuse(f"{path.name}: {type(error).__name__}: {error}") from error
    header = parse_object(text, refuse)
    metadata = header.pop(_METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise refuse(f"{path.name}: {_METADATA} = {metadata!r:.200}", "it maps text to text")
    entries = {
        name: _entry(f"{path.name}: {name!r:.200}", value, path, 8 + length, refuse)
        for name, value in header.items()
    }
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _require_cover(path, entries, 8 + length, facts.st_size, refuse)
    return entries, stamp(facts)


def stamp(facts: os.stat_result) -> Stamp:
    """Which file these are the facts of."""
    return Stamp(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def _entry(name: str, value: Any, path: Path, data: int, refuse: Refusal) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"{name}: {value!r:.200}", "a tensor has a dtype, a shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"{name}: dtype {dtype!r:.100}", f"it is none of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise refuse(f"{name}: shape {shape!r:.200}", "a shape is a list of integers from 0")
    # Without its zeros, since torch multiplies the others into strides.
    if math.prod(size for size in shape if size) > _LARGEST:
        raise refuse(f"{name}: shape {shape!r:.200}", "no tensor has as many elements")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"{name}: data_offsets {offsets!r:.200}", "they are a first and a last byte")
    start, stop = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != needed:
        raise refuse(
            f"{name}: {stop - start} bytes for {dtype} {shape!r:.200}", f"{needed} are needed"
        )
    return Entry(
        dtype=DTYPES[dtype], shape=tuple(shape), path=path, start=data + start, stop=data + stop
    )


def _require_cover(
    path: Path, entries: dict[str, Entry], data: int, size: int, refuse: Refusal
) -> None:
    """Refuse byte ranges, given in their order, that overlap, leave a hole or leave the file."""
    at = data
    for name, entry in entries.items():
        if entry.start != at:
            raise refuse(
                f"{path.name}: {name!r:.200} begins at byte {entry.start}, not at {at}",
                "tensors lie one behind the other, without overlap and without holes",
            )
        at = entry.stop
    if at != size:
        raise refuse(
            f"{path.name}: {size} bytes, but the header describes {at}",
            "the file is truncated, or holds something that its header does not name",
        )


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and 0 <= each <= _LARGEST
        for each in values
    )
