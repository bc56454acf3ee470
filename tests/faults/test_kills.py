"""Killed at any moment, again and again: the final bytes are those of an undisturbed run.

Before every event that changes a file, in the middle of writes, at random times, during the
resumption, and between the checkpoint's name and the end of the clean-up. ``MXTORQ_FAULTS=n`` tries
n times as many points, and other ones.
"""

import random
import shutil
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


def finish(server: Server, run: Run, out: Path) -> None:
    """The same call again, as often as somebody would make it who finds nothing in OUT."""
    if not out.exists():
        ended = server.run(run, out)
        assert ended.error is None, ended.message
    else:
        ended = server.run(run, out)
        assert ended.error == "OutputError"
        assert "a file or folder of that name" in ended.message
    require_right(out, run)


@pytest.mark.parametrize("name", RUNS)
def test_before_an_event(name: str, server: Server, runs: dict[str, Run], tmp_path: Path) -> None:
    """Twice, or more: the resumption is killed as well."""
    run, draw = runs[name], random.Random(f"{SEED}-{name}")
    say(f"seed {SEED}")
    for number, at in enumerate(points(run, 5 * FAULTS, draw)):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        killed = [server.run(run, out, {"kind": "kill", "at": at})]
        while not out.exists() and len(killed) < 2 + number % 2:
            again = draw.randint(1, run.events)
            killed.append(server.run(run, out, {"kind": "kill", "at": again}))
        say(f"{name}: before event {at}, then {killed[1:]}")
        assert killed[0].killed
        finish(server, run, out)


@pytest.mark.parametrize("name", RUNS)
def test_at_random_times(name: str, server: Server, runs: dict[str, Run], tmp_path: Path) -> None:
    run, draw = runs[name], random.Random(f"{SEED}-{name}-times")
    say(f"seed {SEED}")
    for number in range(FAULTS):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        ended = [Ended(killed=True)]
        while ended[-1].killed and not out.exists() and len(ended) < 6:
            ended.append(server.run_for(run, out, draw.uniform(0, 1.2) * run.seconds))
        say(f"{name}: {ended}")
        assert all(each.killed or each.error is None for each in ended)
        finish(server, run, out)


@pytest.mark.parametrize("name", ["spilled", "rotated"])
def test_after_the_checkpoint_has_its_name(
    name: str, server: Server, runs: dict[str, Run], tmp_path: Path
) -> None:
    """And in the clean-up, and in the clean-up of what that left."""
    run, whole = runs[name], tmp_path / "whole" / "out"
    whole.parent.mkdir()
    at = named_at(run, server, whole.parent / "counted")
    assert server.run(run, whole, {"kind": "kill", "at": at + 1}).killed
    assert digest(whole) == run.digest
    assert "out.partial" in beside(whole)
    for again in range(1, 100):
        out = Path(shutil.copytree(whole.parent, tmp_path / str(again))) / "out"
        ended = server.run(run, out, {"kind": "kill", "at": again})
        finish(server, run, out)
        if not ended.killed:
            assert again > 10  # there was something to kill it in
            return
    raise AssertionError("the clean-up does not end")


def named_at(run: Run, server: Server, out: Path) -> int:
    """The event by which OUT gets its name: the last but one rename."""
    kinds = server.run(run, out, {"kind": "count"}).kinds
    shutil.rmtree(out)
    (out.parent / f"{out.name}.log").unlink()
    renames = [at for at, kind in enumerate(kinds, 1) if kind == "rename"]
    return renames[-2]


@pytest.mark.parametrize("name", RUNS)
def test_a_power_cut(name: str, server: Server, runs: dict[str, Run], tmp_path: Path) -> None:
    """What the disk had for certain is enough to go on with, and so is any part of the rest."""
    run, draw = runs[name], random.Random(f"{SEED}-{name}-cuts")
    say(f"seed {SEED}")
    for number, at in enumerate(points(run, 3 * FAULTS, draw)):
        room, after = tmp_path / f"{number}", tmp_path / f"{number}-after"
        room.mkdir()
        fault = {"kind": "cut", "at": at, "image": str(after)}
        if number % 2:
            fault["seed"] = draw.randint(0, 2**31)
        say(f"{name}: {fault}")
        assert server.run(run, room / "out", fault).killed
        finish(server, run, after / "out")
