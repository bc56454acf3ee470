"""The ``mxtorq`` command, in a process of its own or in this one.

A process of its own needs three seconds to import torch, and is what a user has. What a test claims
about messages, exit codes and files alone is seen in this process as well; that a code reaches the
shell, that a fresh process can load what another one wrote, and what a signal does, is not.
"""

import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest

from mxtorq import cli


def alone(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "mxtorq", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


def here(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same function with the same arguments, in this process. It ends as it began."""
    command = ["mxtorq", *map(str, arguments)]
    output, errors = StringIO(), StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="200"),  # and what the command sets for itself
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "excepthook"),
        chdir(cwd or Path.cwd()),
        redirect_stdout(output),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    code = ended.value.code or 0
    return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())
