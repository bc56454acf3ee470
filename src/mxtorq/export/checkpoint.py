"""A checkpoint folder: written whole or not at all, and read with suspicion.

    config.json                    transformers' configuration with ``quantization_config``
    model.safetensors              packed weights, scales, and the unquantized tensors in BF16
      (mxtorq-model.safetensors    the same where transforms must run: see `compressed_tensors`;
                                   with the matrices of those that vLLM runs too: see `carried`)
      or, for large models, a file a layer and model.safetensors.index.json
    mxtorq-transforms.safetensors  float64 tensors of each site's other transform, if any
    tokenizer and generation files
    README.md, LICENSE ...         the card, and the source's licence files
    mxtorq.json                    the manifest, with the SHA-256 of every other file

`unfinished` is how such a folder comes to be: whole, by one rename, or not at all. Safetensors and
JSON only.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxtorq.errors import CheckpointError
from mxtorq.export.compressed_tensors import WEIGHTS_FILE, weights_file
from mxtorq.export.manifest import FILE, LONGEST, Manifest
from mxtorq.reading.configuration import read_configuration, require_plausible
from mxtorq.reading.documents import Refusal, read_text
from mxtorq.reading.headers import read_header
from mxtorq.reading.shards import Shards, open_shards
from mxtorq.writing import fingerprint, join_files, write_text

CONFIG = "config.json"
TRANSFORMS = "mxtorq-transforms.safetensors"

SINGLE_FILE = 2**30
"""Bytes of tensors up to which a checkpoint is one file."""

COMPANIONS = (
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "vocab.json", "vocab.txt"),
)
"""The files of tokenizer and generation that transformers reads beside a model."""

_WOULD_BE_READ = frozenset(
    (
        *COMPANIONS,
        "adapter_config.json",
        CONFIG,
        *WEIGHTS_FILE.values(),
        *(f"{file}.index.json" for file in WEIGHTS_FILE.values()),
    )
)
"""What transformers or we would take from the folder, listed in the manifest or not."""


_UNWRITTEN = Refusal(
    kind=CheckpointError,
    asked="the checkpoint that is being written",
    why="a file of it is not as it was written a moment ago",
    todo="look after the disk, and run the same command again",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Contents:
    """A checkpoint whose files were checked; its tensors are read when they are asked for."""

    config: dict[str, Any]
    manifest: Manifest
    weights: Shards
    transforms: Shards | None


def place_tensors(folder: Path, file: str, pieces: Sequence[Path]) -> str:
    """Put tensor files into a checkpoint under its names, as they are or joined.

    Up to `SINGLE_FILE` bytes become ``STEM.safetensors``. More become STEM-00001-of-00003 and so
    on, which are links to the pieces where the disk has links, and an index.

    Returns:
        The file, or its index.

    Raises:
        OSError: the disk is full or refuses.
    """
    parts = [read_header(path, _UNWRITTEN)[0] for path in pieces]
    whole = {name: entry for part in parts for name, entry in part.items()}
    total = sum(entry.nbytes for entry in whole.values())
    if total <= SINGLE_FILE:
        join_files(folder / file, whole)
        return file
    stem, table = file.removesuffix(".safetensors"), {}
    for number, (path, part) in enumerate(zip(pieces, parts, strict=True), 1):
        name = f"{stem}-{number:05d}-of-{len(pieces):05d}.safetensors"
        try:
            os.link(path, folder / name)
        except OSError:  # a disk without links
            shutil.copyfile(path, folder / name)
        table.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": total}, "weight_map": table}
    write_text(folder / f"{file}.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    return f"{file}.index.json"


def place_transforms(folder: Path, pieces: Sequence[Path]) -> None:
    """Join the tensors of all transforms, if there are any. Raises `OSError`."""
    parts = [read_header(path, _UNWRITTEN)[0] for path in pieces]
    if parts:
        join_files(folder / TRANSFORMS, {n: entry for part in parts for n, entry in part.items()})


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json. Raises `OSError`."""
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, last of all. Raises `OSError`."""
    write_text(folder / FILE, manifest.to_json())


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of ours."""
    return (folder / FILE).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest and check every file that it names.

    Raises:
        CheckpointError: there is none, a file is missing, truncated or changed, or one that would
            be read stands there without being named.
    """
    absent = Refusal(
        kind=CheckpointError,
        asked=f"the checkpoint {folder}",
        why=f"a checkpoint of mxtorq is a folder with a manifest {FILE}",
        todo="name the folder that `mxtorq quantize` wrote",
    )
    manifest = Manifest.from_json(read_text(folder / FILE, LONGEST, absent), str(folder / FILE))
    for name, expected in manifest.files.items():
        found = _found(folder, name, expected)
        if found != expected:
            raise CheckpointError(
                asked=f"{name!r:.200} of the checkpoint {folder}",
                found=f"{found}, the manifest says {expected}",
                why="the file is missing, truncated, changed, or outside of the folder",
                todo="copy the checkpoint again, or quantize again",
            )
    present = sorted(path.name for path in folder.iterdir())
    strange = [n for n in present if n in _WOULD_BE_READ and n not in manifest.files]
    if strange:
        raise CheckpointError(
            asked=f"the checkpoint {folder}",
            found=f"{', '.join(strange)}, which the manifest does not name",
            why="it would be read with the checkpoint and is not part of it",
            todo="remove that file, or copy the checkpoint again",
        )
    return manifest


def read_checkpoint(folder: Path) -> Contents:
    """Read and check a whole checkpoint.

    Raises:
        CheckpointError: as `read_manifest`, or a file does not hold what it should.
    """
    manifest = read_manifest(folder)
    refuse = Refusal(
        kind=CheckpointError,
        asked=f"the checkpoint {folder}",
        why="its files are not what the manifest describes",
        todo="copy the checkpoint again, or quantize again",
    )
    config = read_configuration(folder / CONFIG, refuse)
    described = config.get("quantization_config") or {}
    method = described.get("quant_method")
    if not isinstance(method, str) or method not in WEIGHTS_FILE:
        raise refuse(f"quant_method = {method!r:.200}", f"it is none of {', '.join(WEIGHTS_FILE)}")
    weights = _listed(folder, weights_file(described), manifest, refuse)
    require_plausible(config, len(weights.names), weights.total_bytes, refuse)
    parts = _listed(folder, TRANSFORMS, manifest, refuse) if TRANSFORMS in manifest.files else None
    return Contents(config=config, manifest=manifest, weights=weights, transforms=parts)


def _listed(folder: Path, file: str, manifest: Manifest, refuse: Refusal) -> Shards:
    """The tensors of a file, or of those of its index, which the manifest has fingerprints of."""
    shards = open_shards(folder, refuse, file.removesuffix(".safetensors"))
    for name in shards.files:
        if name not in manifest.files:
            raise refuse(f"{name}, which the manifest does not name")
    return shards


def _found(folder: Path, name: str, expected: dict[str, Any]) -> dict[str, Any] | str:
    """What a file is, looked at only as far as it can be the expected one."""
    if Path(name).name != name or "\0" in name or len(name.encode()) > 255:
        return "a path out of the folder"
    path = folder / name
    try:
        if not path.is_file():
            return "no such file"
        size = path.stat().st_size
        return fingerprint(path) if size == expected["bytes"] else f"{size} bytes"
    except OSError as error:
        return f"{type(error).__name__}: {error}"
