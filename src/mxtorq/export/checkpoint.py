"""A checkpoint folder: written whole or not at all, and read with suspicion.

    config.json                    transformers' configuration with ``quantization_config``
    model.safetensors              packed weights, scales, and the unquantized tensors in BF16
      (mxtorq-model.safetensors    the same where transforms must run: see `compressed_tensors`)
      or, for large models, a file a layer and model.safetensors.index.json
    mxtorq-transforms.safetensors  float64 tensors of each site's transform, if any
    tokenizer and generation files
    mxtorq.json                    the manifest, with the SHA-256 of every other file

Everything is written into a hidden folder beside the target, which gets its name by one rename
after the caller has verified it. Safetensors and JSON only.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxtorq.errors import CheckpointError, OutputError
from mxtorq.export.compressed_tensors import WEIGHTS_FILE
from mxtorq.export.manifest import FILE, LONGEST, Manifest
from mxtorq.reading.configuration import read_configuration, require_plausible
from mxtorq.reading.documents import Refusal, read_text
from mxtorq.reading.shards import Shards, open_shards

CONFIG = "config.json"
TRANSFORMS = "mxtorq-transforms.safetensors"

SINGLE_FILE = 2**30
"""Bytes of tensors up to which a checkpoint is one file."""

_WOULD_BE_READ = frozenset(
    (
        *("adapter_config.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
        *("generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json"),
        *("tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
        *(
            CONFIG,
            *WEIGHTS_FILE.values(),
            *(f"{file}.index.json" for file in WEIGHTS_FILE.values()),
        ),
    )
)
"""What transformers or we would take from the folder, listed in the manifest or not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Contents:
    """A checkpoint whose files were checked; its tensors are read when they are asked for."""

    config: dict[str, Any]
    manifest: Manifest
    weights: Shards
    transforms: Shards | None


def require_absent(out: Path) -> None:
    """Refuse an output that exists or whose parent cannot be written, before any work.

    Raises:
        OutputError: so it is.
    """
    if out.exists() or out.is_symlink():
        raise OutputError(
            asked=f"a checkpoint in {out}",
            found="a file or folder of that name",
            why="nothing is overwritten or mixed with older files",
            todo="name another folder, or remove that one",
        )
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            asked=f"a checkpoint in {out}",
            found=f"{existing}, which is no folder that you may write to",
            why="the checkpoint is written beside its final place first",
            todo="name a folder inside one that is yours",
        )


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` when the block ends well.

    On any exception, Ctrl-C included, it is removed and ``out`` does not come to be.

    Raises:
        OutputError: the disk is full or refuses, or ``out`` has appeared meanwhile.
    """
    require_absent(out)
    made = _make_parents(out)
    staging = None
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        staging.chmod(0o755)
        yield staging
        for path in sorted(staging.iterdir()):
            path.chmod(0o644)
            _sync(path)
        require_absent(out)
        staging.rename(out)
        _sync(out.parent)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            folder.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise OutputError(
                asked=f"a checkpoint in {out}",
                found=f"{type(error).__name__}: {error}",
                why="the files could not be written in full",
                todo="free space on that disk or name another place; nothing was left behind",
            ) from error
        raise


class TensorWriter:
    """Tensors into safetensors files as they come: a file for each call, renamed at the end.

    They end as one file, or as several with an index when they are more than `SINGLE_FILE` bytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pieces: list[Path] = []
        self._names: list[list[str]] = []
        self.total_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write some tensors.

        Raises:
            OutputError: the disk has too little room.
        """
        needed = sum(t.numel() * t.element_size() for t in tensors.values())
        _require_room(self._folder, needed)
        piece = self._folder / f"piece-{len(self._pieces):05d}.safetensors"
        save_file(_plain(tensors), piece, metadata={"format": "pt"})
        self._pieces.append(piece)
        self._names.append(sorted(tensors))
        self.total_bytes += needed

    def finish(self, file: str) -> None:
        """Give the files their names: ``STEM.safetensors``, or STEM-00001-of-00003 and so on.

        Raises:
            OutputError: the disk has too little room.
        """
        stem = file.removesuffix(".safetensors")
        if self.total_bytes <= SINGLE_FILE:
            _require_room(self._folder, self.total_bytes)
            whole = {name: t for piece in self._pieces for name, t in load_file(piece).items()}
            save_file(_plain(whole), self._folder / file, metadata={"format": "pt"})
            for piece in self._pieces:
                piece.unlink()
            return
        count, table = len(self._pieces), {}
        for number, (piece, names) in enumerate(zip(self._pieces, self._names, strict=True), 1):
            name = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
            piece.rename(self._folder / name)
            table.update(dict.fromkeys(names, name))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": table}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._folder / f"{file}.index.json").write_text(text, encoding="utf-8")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_transforms(folder: Path, transforms: Mapping[str, Tensor]) -> None:
    """Write the tensors of all transforms, if there are any.

    Raises:
        OutputError: the disk has too little room.
    """
    if transforms:
        _require_room(folder, sum(t.numel() * t.element_size() for t in transforms.values()))
        save_file(_plain(transforms), folder / TRANSFORMS, metadata={"format": "pt"})


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + 2**20:
        raise OutputError(
            asked=f"{needed / 1e6:.1f} MB in {folder.parent}",
            found=f"{free / 1e6:.1f} MB free",
            why="the checkpoint does not fit",
            todo="free space on that disk or name another place; nothing was left behind",
        )


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file in a folder: ``sha256`` and ``bytes``."""
    return {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, last of all."""
    (folder / FILE).write_text(manifest.to_json(), encoding="utf-8")


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
    method = (config.get("quantization_config") or {}).get("quant_method")
    if not isinstance(method, str) or method not in WEIGHTS_FILE:
        raise refuse(f"quant_method = {method!r:.200}", f"it is none of {', '.join(WEIGHTS_FILE)}")
    weights = _listed(folder, WEIGHTS_FILE[method], manifest, refuse)
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
        return _fingerprint(path) if size == expected["bytes"] else f"{size} bytes"
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _make_parents(out: Path) -> list[Path]:
    """Create missing parents; returns them, innermost first, so that they can be taken back."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    for folder in reversed(made):
        folder.mkdir()
    return made


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
