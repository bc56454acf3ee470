"""A file or folder that appears whole or not at all, made beside its place and renamed at the end.

For what is made in one go and can be made again: a run that goes on after a kill is `unfinished`.
The name that it is made under is fixed (``.OUT.exporting``) and locked, so that two processes do
not meet there, and what a kill left is taken away by the next one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mxtorq.errors import OutputError
from mxtorq.export.folders import discard
from mxtorq.export.output import alone, parents, require_absent
from mxtorq.writing import sync


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A path that does not exist; what the block puts there becomes ``out`` when it ends well.

    Raises:
        OutputError: ``out`` exists, another process makes it, or the disk is full or refuses.
    """
    require_absent(out)
    staging = out.with_name(f".{out.name}.exporting")
    try:
        with parents(out), alone(out):
            discard(staging)
            try:
                yield staging
                for path in sorted(staging.rglob("*")) if staging.is_dir() else ():
                    sync(path)
                sync(staging)
                require_absent(out)
                staging.rename(out)
                sync(out.parent)
            finally:
                discard(staging)
    except OSError as error:
        raise OutputError(
            asked=f"an export to {out}",
            found=f"{type(error).__name__}: {error}",
            why="the files could not be written in full; nothing is left",
            todo="free space on that disk, or mend it, and run the same command again",
        ) from error
