"""An unfinished run on a rank that does not lead it (see `mxtorq.ranks`).

The leader holds the run (`unfinished`): its lock, its record, its log. The other ranks read and
write activations in its folder and nothing else. What they need for that is that they see this
folder, and that they were started with the same arguments on the same files, for a machine of its
own may have others: both are seen from what the leader has written there.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mxtorq.errors import OutputError
from mxtorq.export.output import partial_folder
from mxtorq.export.unfinished import Unfinished


@contextmanager
def following(out: Path) -> Iterator[Unfinished]:
    """The run that makes ``out``, for its activations.

    Raises:
        OutputError: the disk is full or refuses.
    """
    try:
        yield Unfinished(out, {})
    except OSError as error:
        raise OutputError(
            asked=f"activations in {partial_folder(out)}",
            found=f"{type(error).__name__}: {error}",
            why="the files could not be written in full",
            todo="free space on that disk, or mend it, and run the same command again",
        ) from error


def require_shared(out: Path, request: Mapping[str, Any]) -> None:
    """Refuse to work on a run that the leader has opened and that is not seen here as it is.

    Raises:
        OutputError: its folder is not there, or it was asked for something else.
        CheckpointError: its record is damaged.
    """
    folder = partial_folder(out)
    if not (folder / "run.json").is_file():
        raise OutputError(
            asked=f"the unfinished run {folder.absolute()} on every rank",
            found="no such folder on this one",
            why="each rank keeps the activations of its own batches there",
            todo="name an output on a file system that all machines share, by its whole path",
        )
    Unfinished(out, request).require_same()
