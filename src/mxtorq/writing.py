"""Files that a power cut leaves whole or absent: safetensors and text.

    8 bytes    length of the header, little endian
    header     JSON, padded with spaces to a multiple of 8
    data       the tensors, without holes; wider types first, so that each begins aligned

The library's own writer copies every tensor into Python bytes first. This one hands a tensor's
memory to the file piece by piece, hashes it on the way, and gives the file its name when the disk
has it: `written` is the same for any file. The bytes are a function of names and values alone.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from mxtorq.reading.headers import DTYPES, Entry

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 2**24
"""Bytes that are hashed and written at once."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors under their names; returns ``sha256`` and ``bytes`` of the file.

    Raises:
        OSError: as `written`.
    """
    parts = {
        name: (_NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())
        for name, tensor in tensors.items()
    }

    def data(name: str) -> Iterator[memoryview]:
        flat = tensors[name].detach().cpu().contiguous().flatten()
        if len(flat):
            whole: memoryview = flat.view(DTYPES["U8"]).numpy().data
            yield from (whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE))

    return _write(path, parts, data)


def join_files(path: Path, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Write the tensors of some files, by their headers, into one; returns as `write_tensors`.

    Raises:
        OSError: as `written`, or a file ended early.
    """
    parts = {name: (_NAMES[e.dtype], e.shape, e.nbytes) for name, e in entries.items()}

    def data(name: str) -> Iterator[bytes]:
        entry = entries[name]
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            left = entry.nbytes
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise OSError(f"{entry.path.name} is shorter than its header says")
                yield piece
                left -= len(piece)

    return _write(path, parts, data)


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a text in UTF-8; returns as `write_tensors`. Raises `OSError`."""
    content = text.encode("utf-8")
    with written(path) as file:
        file.write(content)
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends well and the disk has its bytes.

    Raises:
        OSError: the disk is full or refuses; there is no such file then, unless it was the name
            alone that the disk would not promise to keep.
    """
    staging = path.with_name(f".{path.name}.writing")
    try:
        with staging.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):  # the error that led here is the one to tell
            staging.unlink(missing_ok=True)
        raise


def fingerprint(path: Path) -> dict[str, Any]:
    """``sha256`` and ``bytes`` of a file. Raises `OSError`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def sync(path: Path) -> None:
    """Wait until the disk has a file, or what a folder lists."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(
    path: Path,
    parts: Mapping[str, tuple[str, tuple[int, ...], int]],
    data: Callable[[str], Iterator[bytes | memoryview]],
) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(parts, key=lambda name: (-DTYPES[parts[name][0]].itemsize, name))
    at = 0
    for name in order:
        dtype, shape, size = parts[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with written(path) as file:

        def put(piece: bytes | memoryview) -> None:
            digest.update(piece)
            file.write(piece)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for name in order:
            for piece in data(name):
                put(piece)
    return {"sha256": digest.hexdigest(), "bytes": 8 + len(text) + at}
