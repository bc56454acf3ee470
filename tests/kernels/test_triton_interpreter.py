"""The Triton kernels without a GPU: their tests, in a process whose Triton interprets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("mxfp4", "rotate", "gptq", "matmul", "wiring")


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="needs Triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process interprets already")
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(folder / f"test_triton_{name}.py") for name in FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 40


def test_nothing_imports_triton_unasked():
    """What the default path imports, and this folder's own door plate, load no Triton kernels."""
    code = (
        "import sys, mxtorq.formats.mxfp4, mxtorq.kernels.dispatch, mxtorq.kernels.triton;"
        "print([m for m in sys.modules if m.startswith(('triton', 'mxtorq.kernels.triton.'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
