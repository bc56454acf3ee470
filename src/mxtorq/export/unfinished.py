"""A checkpoint that is being made, layer by layer, by a process that may end at any moment.

    OUT.partial/
      run.json                     what was asked for: model, recipe, data, versions
      rotations.safetensors        what was merged into the whole model, if anything (and .json)
      layers/00003.safetensors     a quantized layer as the checkpoint will have it
      layers/00003-transforms.safetensors
      layers/00003.json            its record: sites, and the hash of every file of it
      activations/00004-00000.safetensors   what layer 4 gets, batch by batch
      checkpoint/                  what becomes OUT, made of links to the above at the very end
    OUT.lock                       held by the process that works on it
    OUT.log                        what happened when; it stays

A file gets its name when the disk has it, and a layer is finished when its record is there, which
comes last. So whatever a kill leaves behind is some number of finished layers, and files that are
made again. The activations of the last finished layer are among its files: going on takes no
forward pass through earlier layers. Until the last step nothing that is finished is changed, so
that step, too, may be cut short and made again.

Another run is another request, field by field, and is refused with the fields that differ.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from mxtorq.errors import CheckpointError, MxtorqError, OutputError, VerificationError
from mxtorq.export.manifest import SiteEntry, site_entries
from mxtorq.reading.documents import Refusal, fields_of, parse_object, read_text
from mxtorq.reading.shards import open_file
from mxtorq.transforms import KINDS
from mxtorq.transforms.base import OfflineRotations, Rotation, Transform
from mxtorq.writing import fingerprint, sync, write_tensors, write_text

_LONGEST = 32 * 2**20
"""Bytes of a record."""


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """A finished layer."""

    sites: list[SiteEntry]
    kept: list[str]
    """Its linears that stay in BF16, by full name."""
    files: dict[str, dict[str, Any]]
    """``sha256`` and ``bytes`` by path below the folder; the activations behind it included."""


class Unfinished:
    """The state of a run. Made by `unfinished`."""

    def __init__(self, out: Path, request: Mapping[str, Any]) -> None:
        self.out, self.folder = out, partial_folder(out)
        self.layers: list[LayerRecord] = []
        self._request = request
        self._lines: list[str] = []
        self._refuse = Refusal(
            kind=CheckpointError,
            asked=f"to go on with the unfinished run {self.folder}",
            why="the run that wrote it did not leave it like this, so what would come of it is "
            "not what was asked for",
            todo="remove that folder to start again",
        )

    def open(self) -> None:
        """Start, or find out how far an earlier process came.

        Raises:
            OutputError: it was asked for something else.
            CheckpointError: its files are damaged.
        """
        if not (self.folder / "run.json").exists():
            for part in (self.folder, self.folder / "layers", self.folder / "activations"):
                part.mkdir(exist_ok=True)  # an earlier process was killed in this very function
            self._require_empty()
            write_text(self.folder / "run.json", json.dumps(self._request, indent=1) + "\n")
            return
        self.require_same()
        while (self._path(len(self.layers), ".json")).exists():
            self.layers.append(self._read_record(len(self.layers)))
        last = self.layers[-1].files if self.layers else {}
        for record in self.layers:
            for name, expected in record.files.items():
                if name in last or not name.startswith("activations/"):
                    self._require_whole(name, expected)
        if self.layers:
            self.log(f"going on: {self.finished} layers were finished before")
        for path in (self.folder / "activations").iterdir():  # of a layer that was not finished
            if f"activations/{path.name}" not in last:
                path.unlink()

    def require_same(self) -> None:
        """Refuse what is there if it was asked for something else. Raises as `open`."""
        text = read_text(self.folder / "run.json", _LONGEST, self._refuse)
        _require_same(self.folder, parse_object(text, self._refuse), self._request)

    @property
    def finished(self) -> int:
        """Layers that need no more work."""
        return len(self.layers)

    @property
    def activations(self) -> Path:
        """The folder of what layers get."""
        return self.folder / "activations"

    def add_layer(
        self,
        tensors: Mapping[str, Tensor],
        transforms: Mapping[str, Transform],
        sites: list[SiteEntry],
        kept: list[str],
        activations: Mapping[str, dict[str, Any]],
    ) -> None:
        """The next layer is finished: keep what there is of it, and let go of what led to it.

        Args:
            tensors: as the checkpoint keeps them, by full name.
            transforms: by site.
            sites: what the manifest says of them.
            kept: linears that stay in BF16, by full name.
            activations: fingerprints of the files, in `activations`, of what the next layer gets.

        Raises:
            OSError: the disk is full or refuses.
        """
        index = len(self.layers)
        files = {f"activations/{name}": facts for name, facts in activations.items()}
        parts = transform_tensors(transforms)
        for path, content in (
            (self._path(index), tensors),
            (self._path(index, "-transforms.safetensors"), parts),
        ):
            if content:
                files[f"layers/{path.name}"] = write_tensors(path, content)
        record = LayerRecord(sites=sites, kept=kept, files=files)
        write_text(self._path(index, ".json"), json.dumps(asdict(record), indent=1) + "\n")
        self.layers.append(record)
        for path in self.activations.iterdir():
            if path.name not in activations:
                path.unlink()

    def keep_rotations(self, rotations: OfflineRotations) -> None:
        """Remember what was chosen for the whole model. Raises `OSError`."""
        chosen = named_rotations(rotations)
        if any(each.kind not in KINDS for each in chosen.values()):
            return  # one of the caller's own: chosen anew, which gives the same
        facts = write_tensors(self.folder / "rotations.safetensors", transform_tensors(chosen))
        kinds = {name: [each.kind, each.width] for name, each in chosen.items()}
        record = json.dumps({"kinds": kinds, "file": facts}, indent=1) + "\n"
        write_text(self.folder / "rotations.json", record)

    def rotations(self) -> OfflineRotations | None:
        """What `keep_rotations` was given.

        Raises:
            CheckpointError: the files are damaged.
        """
        path = self.folder / "rotations.json"
        if not path.exists():
            return None
        record = parse_object(read_text(path, _LONGEST, self._refuse), self._refuse)
        try:
            self._require_whole("rotations.safetensors", record["file"])
            stored = open_file(self.folder / "rotations.safetensors", self._refuse)
            made = {
                name: KINDS[kind].from_tensors(width, stored.below(name))
                for name, (kind, width) in record["kinds"].items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise self._refuse(f"rotations.json: {type(error).__name__}: {error}") from error
        return rotations_named(made)

    def pieces(self, ending: str = ".safetensors") -> list[Path]:
        """The tensor files of all layers, in order; those of one ``ending`` behind the number."""
        paths = [self._path(index, ending) for index in range(len(self.layers))]
        return [path for path in paths if path.exists()]

    @contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """An empty folder that becomes OUT when the block ends well.

        Raises:
            OutputError: OUT has appeared meanwhile.
            OSError: the disk is full or refuses.
        """
        folder = self.folder / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        for path in sorted(folder.iterdir()):
            sync(path)
        sync(folder)
        require_absent(self.out)
        folder.rename(self.out)
        sync(self.out.parent)

    @property
    def is_of_use(self) -> bool:
        """Whether there is anything to go on with."""
        return bool(self.layers) or (self.folder / "rotations.json").exists()

    def log(self, text: str) -> None:
        """Add a line to the log, which comes to be when there is something to go on with."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._lines.append(f"{now} {text}\n")
        if not self.is_of_use:
            return
        try:
            with log_file(self.out).open("a", encoding="utf-8") as file:
                file.writelines(self._lines)
        except OSError:  # a full disk stops the run where it writes what counts
            return
        self._lines.clear()

    def remove(self) -> None:
        """Let go of everything but the log; last of all of what says whose folder it is."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "run.json":
                path.unlink()
        (self.folder / "run.json").unlink(missing_ok=True)
        self.folder.rmdir()
        _lock_file(self.out).unlink(missing_ok=True)

    def _path(self, index: int, ending: str = ".safetensors") -> Path:
        return self.folder / "layers" / f"{index:05d}{ending}"

    def _require_empty(self) -> None:
        strange = [path for path in self.folder.rglob("*") if path.is_file()]
        strange = [path for path in strange if path.name != ".run.json.writing"]
        if strange:
            raise OutputError(
                asked=f"the folder {self.folder} for an unfinished run",
                found=f"{strange[0].name} and no run.json in it",
                why="it is somebody else's, and nothing is overwritten or mixed with other files",
                todo="name another output, or move that folder away",
            )

    def _read_record(self, index: int) -> LayerRecord:
        path = self._path(index, ".json")
        content = parse_object(read_text(path, _LONGEST, self._refuse), self._refuse)
        content["sites"] = site_entries(content.get("sites"), self._refuse)
        return LayerRecord(**fields_of(content, LayerRecord, self._refuse, path.name))

    def _require_whole(self, name: str, expected: dict[str, Any]) -> None:
        path = self.folder / name
        if not path.is_file():
            raise self._refuse(f"no {name}")
        found = fingerprint(path)
        if found != expected:
            raise self._refuse(f"{name}: {found}, its record says {expected}")


@contextmanager
def unfinished(out: Path, request: Mapping[str, Any]) -> Iterator[Unfinished]:
    """The run that makes ``out``: a new one, or an earlier one with the same request.

    When the block ends well, nothing but ``out`` and its log is left. When it ends otherwise, what
    is finished stays, unless it was found to be wrong; where nothing is, nothing stays.

    Raises:
        OutputError: ``out`` exists, another process works on it, an earlier run was asked for
            something else, or the disk is full or refuses.
        CheckpointError: the files of an earlier run are damaged.
    """
    made = _make_parents(out)
    run = Unfinished(out, request)
    try:
        with _lock(out):
            require_absent(out)
            run.open()
            try:
                yield run
            except BaseException as error:
                run.log(f"ended with {run.finished} finished layers: {_told(error)}")
                if isinstance(error, VerificationError) or not run.is_of_use:
                    run.remove()
                raise
            run.log(f"written and read back: {out}")
            run.remove()
    except OSError as error:
        kept = f"{run.finished} finished layers are kept" if run.is_of_use else "nothing is left"
        raise OutputError(
            asked=f"a checkpoint in {out}",
            found=f"{type(error).__name__}: {error}",
            why="the files could not be written in full",
            todo=f"free space on that disk, or mend it, and run the same command again; {kept}",
        ) from error
    finally:
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def require_free(out: Path) -> None:
    """Refuse an output that exists, after taking away what a kill in the last moment left of it.

    Raises:
        OutputError: as `require_absent`, or another process works on it.
    """
    if out.exists() and (partial_folder(out) / "run.json").exists():
        with _lock(out):
            Unfinished(out, {}).remove()
    require_absent(out)


def partial_folder(out: Path) -> Path:
    """Where an unfinished run keeps its state."""
    return out.with_name(f"{out.name}.partial")


def log_file(out: Path) -> Path:
    """Where a run says what happened when."""
    return out.with_name(f"{out.name}.log")


def finished_layers(out: Path) -> int:
    """How many layers of an unfinished run are finished, by a glance."""
    layers = partial_folder(out) / "layers"
    return len(list(layers.glob("[0-9]*.json"))) if layers.is_dir() else 0


def transform_tensors(transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
    """The tensors of some transforms under the names that checkpoints give them."""
    return {
        f"{name}.{part}": tensor
        for name, transform in transforms.items()
        for part, tensor in transform.tensors().items()
    }


def named_rotations(rotations: OfflineRotations) -> dict[str, Rotation]:
    """The rotations of a whole model under the names that records give them."""
    named = {f"head.{number}": each for number, each in enumerate(rotations.heads)}
    return named if rotations.residual is None else {"residual": rotations.residual, **named}


def rotations_named(transforms: Mapping[str, Transform]) -> OfflineRotations:
    """The inverse of `named_rotations`."""
    rotations = {name: each for name, each in transforms.items() if isinstance(each, Rotation)}
    residual = rotations.pop("residual", None)
    return OfflineRotations(residual, tuple(rotations[f"head.{n}"] for n in range(len(rotations))))


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
def _lock(out: Path) -> Iterator[None]:
    lock = FileLock(_lock_file(out), blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            asked=f"a checkpoint in {out}",
            found=f"another process that holds {_lock_file(out).name}",
            why="two runs in one folder would overwrite each other's layers",
            todo="wait for it, or name another folder",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _lock_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.lock")


def _told(error: BaseException) -> str:
    name = type(error).__name__
    return f"{name}: {error.found}" if isinstance(error, MxtorqError) else f"{name} {error}".strip()


def _require_same(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = _flat(earlier), _flat(now)
    differing = [
        f"{name} = {before.get(name)!r:.100} (now {after.get(name)!r:.100})"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    if differing:
        raise OutputError(
            asked=f"to go on with the unfinished run {folder}",
            found=f"a run with {'; '.join(differing[:5])}",
            why="the layers that it finished belong to another checkpoint",
            todo="give it the arguments of that run, name another output, or remove that folder to "
            "start again",
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _make_parents(out: Path) -> list[Path]:
    """Create missing parents; returns them, innermost first, so that they can be taken back."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    for folder in reversed(made):
        folder.mkdir()
    return made
