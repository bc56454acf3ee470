"""What an unfinished run does with folders: look whose they are, list them, remove what is in them.

A link in the place of a folder is never followed: what it leads to is somebody else's.
"""

import shutil
from pathlib import Path

from mxtorq.errors import OutputError
from mxtorq.export.records import REQUEST


def require_own_folder(path: Path) -> None:
    """Refuse a link or a file in the place of an unfinished run's folder.

    Raises:
        OutputError: so it is.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(
            asked=f"the folder {path} for an unfinished run",
            found="a link or a file of that name",
            why="an unfinished run lies beside its output, on the same disk",
            todo="name another output, or move that file away",
        )


def is_blank(path: Path) -> bool:
    """Whether a process that was killed as it started may have left this."""
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name in ("layers", "activations") and not listed(path)
    return path.name == f".{REQUEST}.writing"


def listed(folder: Path) -> list[Path]:
    """What a folder holds, in order; nothing, if there is none."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def discard(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
