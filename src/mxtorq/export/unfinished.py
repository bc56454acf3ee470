"""A checkpoint that is being made, layer by layer, by a process that may end at any moment.

    OUT.partial/
      run.json                     what was asked for: model, recipe, data, versions, machine
      rotations.safetensors        what was merged into the whole model, if anything (and .json)
      layers/00003.safetensors     a quantized layer as the checkpoint will have it
      layers/00003-transforms.safetensors
      layers/00003.json            its record: sites, and the hash of every file of it
      activations/00004-00000.safetensors   what layer 4 gets, batch by batch
      checkpoint/                  what becomes OUT, made of links to the above at the very end
      published.json               the fingerprint of OUT's manifest, just before OUT gets its name
      removing.json                run.json, once all of this is to go

A file gets its name when the disk has it, and a layer is finished when its record is there, which
comes last. So whatever a kill leaves behind is some number of finished layers, and files that are
made again. The activations of the last finished layer are among its files: going on takes no
forward pass through earlier layers. Until the last step nothing that is finished is changed, so
that step, too, may be cut short and made again; and so may the removal.

Another run is another request, field by field, and is refused with the fields that differ. How it
is known that a record is this run's, and its files what they were: see `records`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from mxtorq.errors import CheckpointError, MxtorqError, OutputError, VerificationError
from mxtorq.export.folders import discard, is_blank, listed, require_own_folder
from mxtorq.export.manifest import FILE, SiteEntry, site_entries
from mxtorq.export.named import named_rotations, rotations_named, transform_tensors
from mxtorq.export.output import alone, lock_file, log_file, parents, partial_folder, require_absent
from mxtorq.export.records import (
    LONGEST,
    REQUEST,
    LayerRecord,
    read_sealed,
    require_same,
    require_whole,
    seal_of,
    write_sealed,
)
from mxtorq.reading.documents import Refusal, fields_of, parse_object, read_text
from mxtorq.reading.shards import open_file
from mxtorq.transforms import KINDS
from mxtorq.transforms.base import OfflineRotations, Transform
from mxtorq.writing import fingerprint, sync, write_tensors, write_text

_REMOVING, _PUBLISHED = "removing.json", "published.json"


class Unfinished:
    """The state of a run. Made by `unfinished`."""

    def __init__(self, out: Path, request: Mapping[str, Any]) -> None:
        self.out, self.folder = out, partial_folder(out)
        self.layers: list[LayerRecord] = []
        self.is_open = False
        """Whether the folder is known to be this run's."""
        self._request: dict[str, Any] = json.loads(json.dumps(request))  # as it is read again
        self._seals = [seal_of("", self._request)]
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
            OutputError: it was asked for something else, or the folder is somebody else's.
            CheckpointError: its files are damaged.
            OSError: the disk is full or refuses.
        """
        require_own_folder(self.folder)
        if (self.folder / _REMOVING).exists():
            self.remove()
        if (self.folder / REQUEST).exists() and not self._has_finished_something():
            self.remove()  # killed too early to go on with: room for any request
        if (self.folder / REQUEST).exists():
            self._go_on()
        else:
            self._start()
        self.is_open = True

    def _has_finished_something(self) -> bool:
        marks = (self._path(0, ".json"), self.folder / "rotations.json")
        return any(os.path.lexists(path) for path in marks)

    def _start(self) -> None:
        """Make the folder; an earlier process may have been killed while it did the same."""
        strange = [path for path in listed(self.folder) if not is_blank(path)]
        if strange:
            raise OutputError(
                asked=f"the folder {self.folder} for an unfinished run",
                found=f"{strange[0].name} and no {REQUEST} in it",
                why="it is somebody else's, and nothing is overwritten or mixed with other files",
                todo="name another output, or move that folder away",
            )
        try:
            for part in (self.folder, self.folder / "layers", self.activations):
                part.mkdir(exist_ok=True)
            write_text(self.folder / REQUEST, json.dumps(self._request, indent=1) + "\n")
            sync(self.folder.parent)
        except BaseException:
            with suppress(OSError):
                self.remove()
            raise

    def _go_on(self) -> None:
        self.require_same()
        for part in (self.folder / "layers", self.activations):
            if os.path.lexists(part) and (part.is_symlink() or not part.is_dir()):
                raise self._refuse(f"{part.name}, which is no folder")
            part.mkdir(exist_ok=True)
        while os.path.lexists(self._path(len(self.layers), ".json")):
            self._read_record()
        last = self.layers[-1].files if self.layers else {}
        named = {self._path(index, ".json") for index in range(len(self.layers))}
        for record in self.layers:
            for name, expected in record.files.items():
                if name in last or not name.startswith("activations/"):
                    require_whole(self.folder, name, expected, self._refuse)
                    named.add(self.folder / name)
        if self.layers:
            self.log(f"going on: {self.finished} layers were finished before")
        for part in (self.folder / "layers", self.activations):
            for path in listed(part):  # of a layer that was not finished
                if path not in named:
                    discard(path)

    def require_same(self) -> None:
        """Refuse what is there if it was asked for something else. Raises as `open`."""
        text = read_text(self.folder / REQUEST, LONGEST, self._refuse)
        require_same(self.folder, parse_object(text, self._refuse), self._request)

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
        seal = write_sealed(self._path(index, ".json"), asdict(record), self._seals[-1])
        self._add(record, seal)
        for path in listed(self.activations):
            if path.name not in activations:
                discard(path)

    def keep_rotations(self, rotations: OfflineRotations) -> None:
        """Remember what was chosen for the whole model. Raises `OSError`."""
        chosen = named_rotations(rotations)
        if any(each.kind not in KINDS for each in chosen.values()):
            return  # one of the caller's own: chosen anew, which gives the same
        facts = write_tensors(self.folder / "rotations.safetensors", transform_tensors(chosen))
        kinds = {name: [each.kind, each.width] for name, each in chosen.items()}
        record = {"kinds": kinds, "file": facts}
        write_sealed(self.folder / "rotations.json", record, self._seals[0])

    def rotations(self) -> OfflineRotations | None:
        """What `keep_rotations` was given.

        Raises:
            CheckpointError: the files are damaged.
        """
        path = self.folder / "rotations.json"
        if not path.exists():
            return None
        record, _ = read_sealed(path, self._seals[0], self._refuse)
        try:
            require_whole(self.folder, "rotations.safetensors", record["file"], self._refuse)
            stored = open_file(self.folder / "rotations.safetensors", self._refuse)
            made = {
                name: KINDS[kind].from_tensors(width, stored.below(name))
                for name, (kind, width) in record["kinds"].items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise self._refuse(f"rotations.json: {type(error).__name__}: {error}") from error
        return rotations_named(made)

    def pieces(self, ending: str = ".safetensors") -> list[Path]:
        """The tensor files of all layers, in order; those of one ``ending`` behind the number.

        Raises:
            CheckpointError: one is not as it was written.
        """
        paths = []
        for index, record in enumerate(self.layers):
            path = self._path(index, ending)
            name = f"layers/{path.name}"
            if name in record.files:
                require_whole(self.folder, name, record.files[name], self._refuse)
                paths.append(path)
        return paths

    @contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """An empty folder that becomes OUT when the block ends well.

        Raises:
            OutputError: OUT has appeared meanwhile.
            OSError: the disk is full or refuses.
        """
        folder = self.folder / "checkpoint"
        discard(folder)
        folder.mkdir()
        yield folder
        for path in sorted(folder.iterdir()):
            sync(path)
        sync(folder)
        published = json.dumps(fingerprint(folder / FILE)) + "\n"
        write_text(self.folder / _PUBLISHED, published)
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
        """Let go of everything but the log.

        What is left by a removal that ends early says so itself, and the next one finishes it.

        Raises:
            OSError: the disk refuses.
        """
        if (self.folder / REQUEST).exists():
            (self.folder / REQUEST).rename(self.folder / _REMOVING)
            with suppress(OSError):  # a disk that promises nothing can still let go
                sync(self.folder)  # before anything goes
        for path in listed(self.folder):
            if path.name != _REMOVING:
                discard(path)
        with suppress(OSError):
            sync(self.folder)
        discard(self.folder / _REMOVING)
        self.folder.rmdir()

    @property
    def is_over(self) -> bool:
        """Whether the folder is what a kill left of a run that made OUT, or of no run at all."""
        if (self.folder / _REMOVING).exists() or not listed(self.folder):
            return True
        published, made = self.folder / _PUBLISHED, self.out / FILE
        if not (published.is_file() and made.is_file()):
            return False
        content = parse_object(read_text(published, LONGEST, self._refuse), self._refuse)
        return content == fingerprint(made)

    def _path(self, index: int, ending: str = ".safetensors") -> Path:
        return self.folder / "layers" / f"{index:05d}{ending}"

    def _add(self, record: LayerRecord, seal: str) -> None:
        self.layers.append(record)
        self._seals.append(seal)

    def _read_record(self) -> None:
        """The record of the next layer."""
        path = self._path(len(self.layers), ".json")
        content, seal = read_sealed(path, self._seals[-1], self._refuse)
        content["sites"] = site_entries(content.get("sites"), self._refuse)
        self._add(LayerRecord(**fields_of(content, LayerRecord, self._refuse, path.name)), seal)


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
    run = Unfinished(out, request)
    try:
        with parents(out), alone(out):
            require_absent(out)
            try:
                run.open()
                yield run
            except BaseException as error:
                if run.is_open:
                    run.log(f"ended with {run.finished} finished layers: {_told(error)}")
                    if isinstance(error, VerificationError) or not run.is_of_use:
                        with suppress(OSError):  # the error that led here is the one to tell
                            run.remove()
                raise
            run.log(f"written and read back: {out}")
            try:
                run.remove()
            except OSError as error:  # the next call for this output tries again
                run.log(f"{run.folder} could not be removed: {error}")
    except OSError as error:
        kept = f"{run.finished} finished layers are kept" if run.is_of_use else "nothing is kept"
        raise OutputError(
            asked=f"a checkpoint in {out}",
            found=f"{type(error).__name__}: {error}",
            why="the files could not be written in full",
            todo=f"free space on that disk, or mend it, and run the same command again; {kept}",
        ) from error


def require_free(out: Path) -> None:
    """Refuse an output that exists, after taking away what a kill in the last moment left of it.

    Raises:
        OutputError: as `require_absent`, or another process works on it.
    """
    run = Unfinished(out, {}) if out.name else None
    if run and any(os.path.lexists(path) for path in (run.folder, lock_file(out))):
        with suppress(OSError), alone(out):
            if os.path.lexists(out) and run.folder.is_dir() and run.is_over:
                run.remove()
    require_absent(out)


def _told(error: BaseException) -> str:
    name = type(error).__name__
    return f"{name}: {error.found}" if isinstance(error, MxtorqError) else f"{name} {error}".strip()
