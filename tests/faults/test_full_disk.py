"""Every write can fail: an error that says so, what is finished is kept, and the rest comes later.

Failures come from a counter (each event once, or all that need space from one on), from a limit of
the system on the size of a file, and from a real small disk where one may be mounted.
"""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.harness import (
    FAULTS,
    RUNS,
    SEED,
    Ended,
    Run,
    Server,
    beside,
    digest,
    points,
    require_right,
    say,
)


def require_told(ended: Ended) -> None:
    assert ended.error == "OutputError", (ended.error, ended.message)
    assert "run the same command again" in ended.message


def then(server: Server, run: Run, out: Path, ended: Ended) -> None:
    """The disk is mended: the same call again ends in the right bytes."""
    if out.exists():  # it was the clean-up that failed, or the promise to keep the name
        assert digest(out) == run.digest
        assert server.run(run, out).error == "OutputError"
    else:
        require_told(ended)
        left = set(beside(out)) - {f"{out.name}.log"}
        assert left <= {f"{out.name}.partial"}
        if "nothing is kept" in ended.message:
            assert not list(out.parent.rglob("layers/*.json"))
        else:
            assert left
        again = server.run(run, out)
        assert again.error is None, again.message
    require_right(out, run)


@pytest.mark.parametrize("name", RUNS)
def test_no_space_from_an_event_on(
    name: str, server: Server, runs: dict[str, Run], tmp_path: Path
) -> None:
    run, draw = runs[name], random.Random(f"{SEED}-{name}-full")
    say(f"seed {SEED}")
    for number, at in enumerate(points(run, 3 * FAULTS, draw)):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        say(f"{name}: no space from event {at}")
        then(server, run, out, server.run(run, out, {"kind": "full", "at": at}))


@pytest.mark.parametrize("name", RUNS)
def test_a_single_error(name: str, server: Server, runs: dict[str, Run], tmp_path: Path) -> None:
    """Renames, removals and folders, too, may fail."""
    run, draw = runs[name], random.Random(f"{SEED}-{name}-once")
    say(f"seed {SEED}")
    for number, at in enumerate(points(run, 3 * FAULTS, draw)):
        out = tmp_path / str(number) / "new" / "out"
        out.parent.parent.mkdir()
        say(f"{name}: an error at event {at}")
        fault = {"kind": "once", "at": at}
        ended = server.run(run, out, fault, root=str(out.parent.parent))
        if ended.error is None and out.exists() and not (set(beside(out)) - {"out", "out.log"}):
            require_right(out, run)  # links and the log have a second way
        elif out.parent.exists():
            then(server, run, out, ended)
        else:
            require_told(ended)


def test_a_file_that_the_system_cuts(server: Server, runs: dict[str, Run], tmp_path: Path) -> None:
    """A real failure in the middle of a file: no file may be larger than so much."""
    for name in ("kept", "rotated-spilled"):
        run = runs[name]
        for limit in (500, run.largest // 20, run.largest // 4, run.largest - 1):
            out = tmp_path / name / str(limit) / "new" / "out"
            out.parent.parent.mkdir(parents=True)
            ended = server.run(run, out, largest_file=limit, root="/nowhere")
            require_told(ended)
            assert not out.exists()
            if limit == 500:
                assert list(out.parent.parent.iterdir()) == []
        again = server.run(run, out)
        assert again.error is None
        require_right(out, run)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server that sees a disk of its own in a folder."""
    root = tmp_path_factory.mktemp("small")
    (root / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=64m tmpfs {root / 'disk'}"
    alone = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    try:
        subprocess.run([*alone, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a user namespace that may mount a tmpfs: {error}")
    server = Server(root, *alone, f'{mount} && exec "$@"', "sh")
    yield server, root / "disk"
    server.stop()


def test_a_small_disk(small: tuple[Server, Path], runs: dict[str, Run]) -> None:
    """It is enlarged step by step, and the run goes on each time from where it came to."""
    server, disk = small
    page = os.sysconf("SC_PAGESIZE")
    for name in ("spilled", "rotated"):
        run, out = runs[name], disk / "out"
        pages, finished, failures = 8, 0, 0
        while True:
            server.call("mount", "-o", f"remount,size={pages * page}", "tmpfs", str(disk))
            ended = server.run(run, out, root="/nowhere")
            listed = server.call("find", str(disk), "-name", "[0-9]*.json").split()
            if ended.error is None:
                break
            require_told(ended)
            failures += 1
            assert len(listed) >= finished  # what is finished is kept
            finished = len(listed)
            pages += 29
        say(f"{name}: {failures} times too small, whole with {pages} pages")
        assert failures > 2
        hashes = server.call("sh", "-c", f"cd {out} && find . -type f -exec sha256sum {{}} +")
        found = {line[66:].removeprefix("./"): line[:64] for line in hashes.splitlines()}
        assert found == run.digest
        assert set(server.call("ls", str(disk)).split()) == {"out", "out.log"}
        server.call("sh", "-c", f"rm -r {disk}/*")
