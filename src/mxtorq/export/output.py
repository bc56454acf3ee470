"""The place where a checkpoint will stand: free, writable, and worked on by one process at a time.

    OUT            the checkpoint, whole, or not there
    OUT.partial/   the run that makes it, while it is unfinished: see `unfinished`
    OUT.lock       there while a process works on it; what counts is the lock on it, not the file
    OUT.log        what happened when; it stays

The lock is the kernel's (flock): it goes with the process however that ends, so the file that a
kill leaves behind refuses nobody. The file is removed by whoever holds the lock, while it does. One
who has opened it a moment earlier then gets the lock of a file that has no name any more; so the
name is looked up again once the lock is there.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mxtorq.errors import OutputError


def partial_folder(out: Path) -> Path:
    """Where an unfinished run keeps its state."""
    return out.with_name(f"{out.name}.partial")


def lock_file(out: Path) -> Path:
    """What the process that works on ``out`` holds."""
    return out.with_name(f"{out.name}.lock")


def log_file(out: Path) -> Path:
    """Where a run says what happened when."""
    return out.with_name(f"{out.name}.log")


def require_absent(out: Path) -> None:
    """Refuse an output that exists or whose parent cannot be written, before any work.

    Raises:
        OutputError: so it is.
    """
    if os.path.lexists(out):
        raise OutputError(
            asked=f"a checkpoint in {out}",
            found="a file or folder of that name",
            why="nothing is overwritten or mixed with older files",
            todo="name another folder, or remove that one",
        )
    existing = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            asked=f"a checkpoint in {out}",
            found=f"{existing}, which is no folder that you may write to",
            why="the checkpoint is written beside its final place first",
            todo="name a folder inside one that is yours",
        )


def finished_layers(out: Path) -> int:
    """How many layers of an unfinished run are finished, by a glance."""
    layers = partial_folder(out) / "layers"
    return len(list(layers.glob("[0-9]*.json"))) if layers.is_dir() else 0


def all_layers(out: Path) -> int | None:
    """How many layers the model of an unfinished run has; None where nothing says so."""
    try:
        request = json.loads((partial_folder(out) / "run.json").read_text(encoding="utf-8"))
        return int(request["config"]["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def bytes_below(folder: Path) -> int:
    """What the files of a folder occupy; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """While this lasts, no other process works on ``out``; the file of the lock is gone afterwards.

    Raises:
        OutputError: another process works on it.
        OSError: there can be no such file here.
    """
    path = lock_file(out)
    handle = _locked(path)
    while handle is None:
        handle = _locked(path)
    try:
        yield
    finally:
        with suppress(OSError):  # the lock is what counts, and that goes with the handle
            path.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def parents(out: Path) -> Iterator[None]:
    """Missing parents of ``out`` are made; those that are empty in the end are taken back.

    Raises:
        OSError: the disk is full or refuses.
    """
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        for folder in reversed(made):
            folder.mkdir(exist_ok=True)  # somebody else may need it, too
        yield
    finally:
        with suppress(OSError):  # it is not empty
            for folder in made:
                folder.rmdir()


def _locked(path: Path) -> int | None:
    """A handle with the lock of the file that has this name; None if it has lost it meanwhile."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    kept = False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            kept = os.path.samestat(os.fstat(handle), os.lstat(path))
        return handle if kept else None
    except BlockingIOError as error:
        raise OutputError(
            asked=f"a checkpoint in {path.with_suffix('')}",
            found=f"another process that holds {path.name}",
            why="two runs in one folder would overwrite each other's layers",
            todo="wait for it, or name another folder",
        ) from error
    finally:
        if not kept:
            os.close(handle)
