"""The command line: parses, calls the pipeline, prints.

Every verb uses the same option names. Errors of ours end with exit code 1 and their four parts,
wrong usage with 2, something wrong with a verified checkpoint with 3, Ctrl-C with 130. Heavy
imports wait until a verb runs, so that ``--help`` is quick.

To add a verb: a function under ``@app.command`` in the file where its kind stands.
"""

import os
import signal
import warnings
from typing import Any

# isort: off
from mxtorq.cli import quantize, judge, inspect, checkpoints, report, export  # noqa: F401  (in the order of --help)

# isort: on
from mxtorq.cli.app import app


def main() -> None:
    """Entry point of the ``mxtorq`` command."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A fresh 64 MB buffer costs less in huge pages; torch reads this when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGTERM, _interrupt)  # a polite kill cleans up as Ctrl-C does
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    finally:  # all is said and cleaned up: torchrun may stop what is left of a rank
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
