"""A folder of safetensors files as one table of tensors, opened by its headers alone.

A model is one file (``model.safetensors``) or many that an index names
(``model.safetensors.index.json``). `open_shards` reads and checks all headers, which takes a
millisecond a file and no memory for tensors; `Shards.tensor` then reads one tensor, or some of its
rows. That is what a model larger than memory is read by, layer after layer.

What an index may name are files *in* the folder: plain names, without a separator. An entry of the
folder may itself be a symbolic link and is followed, since the hub's cache is made of them
(``snapshots/REVISION/NAME -> ../../blobs/HASH``); the names that somebody else wrote cannot lead
elsewhere. ``total_size`` in an index is ignored, as everywhere: many that are published are wrong.

A tensor is copied into memory of its own instead of mapped: mapped bytes may lie unaligned, over
which sums round differently, and a file that is truncated while it is mapped ends the process. The
price is one copy, which costs no more than the page faults of a map.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from mxtorq.reading.documents import Refusal, parse_object, read_text
from mxtorq.reading.headers import Entry, Stamp, read_header, stamp

STEM = "model"
"""What transformers calls its weights."""

_LONGEST_INDEX = 32 * 2**20
_SAMPLE = 4096
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """The tensors of a folder. Immutable and without open files, so any thread may read.

    Made by `open_shards`.
    """

    entries: Mapping[str, Entry]
    """By name; file by file, in the order of their bytes, which is the fastest to read in."""
    refuse: Refusal
    stamps: Mapping[Path, Stamp]
    """The files, and which they were when their headers were checked."""

    @property
    def names(self) -> list[str]:
        """All tensors, in the order in which they lie."""
        return list(self.entries)

    @property
    def files(self) -> list[str]:
        """The names of the files within the folder."""
        return [path.name for path in self.stamps]

    @property
    def total_bytes(self) -> int:
        """What all tensors occupy."""
        return sum(entry.nbytes for entry in self.entries.values())

    def entry(self, name: str) -> Entry:
        """Dtype, shape, file and byte range of a tensor.

        Raises:
            MxtorqError: there is no such tensor.
        """
        if name not in self.entries:
            raise self.refuse(f"no tensor {name!r:.200} in {', '.join(self.files)}")
        return self.entries[name]

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A copy of a tensor in aligned memory of its own; nothing else is read.

        Args:
            name: which.
            rows: from where to where on its first axis; all of it unless given.

        Raises:
            MxtorqError: there is no such tensor or it has no such rows, its file has changed since
                it was opened, or the disk fails.
        """
        entry = self.entry(name)
        first, shape = entry.start, entry.shape
        if rows is not None:
            if not 0 <= rows.start <= rows.stop <= (shape[0] if shape else 0):
                raise self.refuse(f"no rows {rows.start} to {rows.stop} in {name!r:.200} {shape}")
            shape = (rows.stop - rows.start, *shape[1:])
            first += rows.start * math.prod(shape[1:]) * entry.dtype.itemsize
        values = torch.empty(math.prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        rest = values.numpy().data
        try:
            with entry.path.open("rb", buffering=0) as file:
                if stamp(os.fstat(file.fileno())) != self.stamps[entry.path]:
                    raise self._changed(entry)
                file.seek(first)
                while rest:  # Linux hands out at most 2 GiB a call
                    count = file.readinto(rest)
                    if not count:
                        raise self._changed(entry)
                    rest = rest[count:]
        except OSError as error:
            raise self.refuse(f"{entry.path.name}: {type(error).__name__}: {error}") from error
        if entry.dtype == torch.bool and bool((values > 1).any()):
            raise self.refuse(f"{name!r:.200} with bytes above 1", "a BOOL is a byte 0 or 1")
        return values.view(entry.dtype).view(shape)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors ``PREFIX.NAME`` by NAME. Raises as `tensor`."""
        start = f"{prefix}."
        names = [name for name in self.entries if name.startswith(start)]
        return {name.removeprefix(start): self.tensor(name) for name in names}

    def sample_digest(self) -> str:
        """SHA-256 over all names, types, shapes, and the first and last 4 KiB of each tensor.

        It tells two trainings of one model apart without reading them whole.

        Raises:
            MxtorqError: the disk fails.
        """
        digest = hashlib.sha256()
        try:
            for name, entry in sorted(self.entries.items()):
                digest.update(f"{name} {entry.dtype} {entry.shape};".encode())
                with entry.path.open("rb", buffering=0) as file:
                    for start in (entry.start, max(entry.start, entry.stop - _SAMPLE)):
                        file.seek(start)
                        digest.update(file.read(min(_SAMPLE, entry.stop - start)))
        except OSError as error:
            raise self.refuse(f"{entry.path.name}: {type(error).__name__}: {error}") from error
        return digest.hexdigest()

    def _changed(self, entry: Entry) -> Exception:
        return self.refuse(
            f"{entry.path.name}, changed since its header was read",
            "its tensors may lie elsewhere now",
        )


def open_shards(folder: Path, refuse: Refusal, stem: str = STEM) -> Shards:
    """The tensors of ``STEM.safetensors`` in a folder, or else of the files that its index names.

    Raises:
        MxtorqError: there are none, a header is wrong, or index and files do not agree.
    """
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.exists():
        entries, first = read_header(single, refuse)
        stamps = {single: first}
    elif index.exists():
        entries, stamps = _open_indexed(index, refuse)
    else:
        raise _none(folder, single.name, refuse)
    return Shards(entries=MappingProxyType(entries), refuse=refuse, stamps=MappingProxyType(stamps))


def open_file(path: Path, refuse: Refusal) -> Shards:
    """The tensors of one file, whatever its name.

    Raises:
        MxtorqError: it is missing, or its header is wrong.
    """
    entries, found = read_header(path, refuse)
    return Shards(entries=MappingProxyType(entries), refuse=refuse, stamps={path: found})


def indexed_files(index: Path, refuse: Refusal) -> dict[str, str]:
    """The file of each tensor by an index, every one a plain name inside the index's folder.

    Raises:
        MxtorqError: it is no index, or names something else.
    """
    content = parse_object(read_text(index, _LONGEST_INDEX, refuse), refuse)
    table = content.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise refuse(f"{index.name}: weight_map = {table!r:.200}", "it maps tensors to files")
    for file in table.values():
        if not isinstance(file, str) or not _is_plain(file):
            raise refuse(
                f"{index.name}: the file {file!r:.200}",
                "an index names *.safetensors files in its own folder, without any path",
            )
    return table


def _open_indexed(index: Path, refuse: Refusal) -> tuple[dict[str, Entry], dict[Path, Stamp]]:
    table = indexed_files(index, refuse)
    entries: dict[str, Entry] = {}
    stamps: dict[Path, Stamp] = {}
    for name in dict.fromkeys(table.values()):
        path = index.parent / name
        found, stamps[path] = read_header(path, refuse)
        for tensor in found:
            if table.get(tensor) != name:
                raise refuse(
                    f"{tensor!r:.200} in {name}; the index has it in {table.get(tensor)}",
                    "index and files are of different models",
                )
        entries.update(found)
    missing = [tensor for tensor in table if tensor not in entries]
    if missing:
        raise refuse(
            f"no tensor {missing[0]!r:.200} in {table[missing[0]]} ({len(missing)} are missing)",
            "index and files are of different models, or a download is not complete",
        )
    return entries, stamps


def _is_plain(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and len(name) <= 255
        and not any(character in name for character in "/\\\0")
    )


def _none(folder: Path, wanted: str, refuse: Refusal) -> Exception:
    try:
        present = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return refuse(f"{type(error).__name__}: {error}")
    pickles = [name for name in present if Path(name).suffix in _PICKLES]
    if pickles:
        return refuse(
            f"no {wanted}, but {', '.join(pickles[:3])}",
            "such files are pickles, which can run any code when they are opened; only safetensors "
            "are read. Convert them where you trust them: "
            "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)`",
        )
    return refuse(f"neither {wanted} nor its index, but {', '.join(present[:5]) or 'nothing'}")
