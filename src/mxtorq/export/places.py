"""Where a run keeps what: beside OUT, under names made from its own. Knows no torch.

OUT.partial    what an unfinished run has finished (see `unfinished`)
OUT.lock       held by the process that works on it
OUT.log        what happened when; it stays
"""

import json
import os
from pathlib import Path

from mxtorq.errors import OutputError


def partial_folder(out: Path) -> Path:
    """Where an unfinished run keeps its state."""
    return out.with_name(f"{out.name}.partial")


def lock_file(out: Path) -> Path:
    """What the process that works on it holds."""
    return out.with_name(f"{out.name}.lock")


def log_file(out: Path) -> Path:
    """Where a run says what happened when."""
    return out.with_name(f"{out.name}.log")


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


def make_parents(out: Path) -> list[Path]:
    """Create missing parents; returns them, innermost first, so that they can be taken back.

    Raises `OSError`.
    """
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    for folder in reversed(made):
        folder.mkdir()
    return made
