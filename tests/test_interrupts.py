"""Ctrl-C while the main thread sits in native code that knows nothing of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxtorq.interrupts import ending_soon

LONG = """
import threading, time, torch
from mxtorq.console import speaking
matrix = torch.eye(4096, dtype=torch.float64)
threading.Thread(target=time.sleep, args=(50,)).start()  # which Python would wait for
with speaking(lambda: "words that were looked up"):
    try:
        print("ready", flush=True)
        while True:
            {work}
    finally:
        print("cleaned up", flush=True)
"""
"""torch lets go of Python's lock in there; an svd of that size takes minutes."""
NATIVE = "torch.linalg.svd(matrix)"
PYTHON = "time.sleep(0.01)"


@pytest.fixture
def child(request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", LONG.format(work=request.param)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    yield process
    process.kill()
    process.communicate()


def ended(process: "subprocess.Popen[str]", *waits: float) -> tuple[str, str, float]:
    """Output, errors and seconds of a process that gets a signal after each wait."""
    started = time.monotonic()
    for wait in waits:
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    return output, errors, time.monotonic() - started


@pytest.mark.parametrize("child", [NATIVE], indirect=True)
def test_native_code_is_given_three_seconds(child: "subprocess.Popen[str]") -> None:
    output, errors, seconds = ended(child, 0.0)
    assert seconds > 2.9
    assert errors.count("Interrupted: words that were looked up.") == 1
    assert "cleaned up" not in output


@pytest.mark.parametrize("child", [NATIVE], indirect=True)
def test_a_second_signal_ends_at_once(child: "subprocess.Popen[str]") -> None:
    _, errors, seconds = ended(child, 0.0, 0.5)
    assert seconds < 2.9
    assert errors.count("Interrupted: words that were looked up.") == 1


@pytest.mark.parametrize("child", [PYTHON], indirect=True)
def test_python_code_ends_by_itself(child: "subprocess.Popen[str]") -> None:
    output, errors, seconds = ended(child, 0.0)
    assert seconds < 40
    assert "cleaned up" in output
    assert errors.count("Interrupted: words that were looked up.") == 1
    assert "Traceback" not in errors


def test_a_block_that_ends_leaves_no_trace() -> None:
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with ending_soon(lambda: pytest.fail("nobody has interrupted")):
        pass
    assert signal.set_wakeup_fd(-1) == -1
    if before is not None:
        assert set(os.listdir("/proc/self/fd")) == before
