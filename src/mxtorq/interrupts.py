"""Ctrl-C that works within seconds, whatever the main thread is doing.

Python raises KeyboardInterrupt between two of its own instructions, and a factorization of a large
matrix is one instruction that takes minutes. The signal itself arrives at once, though, and Python
writes its number into a file descriptor if asked to (`signal.set_wakeup_fd`). A thread waits there.
From the first signal on the main thread has some seconds to end by itself, with everything that it
cleans up; then, or at a second signal, the thread says the last words and ends the process.

That may cut anything short. It is allowed only where what is on disk is whole at any moment, as it
is with `export.unfinished`. The thread needs Python's lock, which native code holds on to unless it
lets go of it: torch and our kernels do.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

GRACE = 3.0
"""Seconds between a signal and the end, at most."""

EXIT_CODE = 130
"""What a shell calls a process that Ctrl-C has ended."""

_OURS = {int(signal.SIGINT), int(signal.SIGTERM)}


@contextmanager
def ending_soon(last_words: Callable[[], None], grace: float = GRACE) -> Iterator[None]:
    """While this lasts, a signal ends the process within some seconds.

    Once there was a signal it lasts until the process has ended, since threads may be waited for.
    In another thread than the main one, which gets no signals, it does nothing.

    Args:
        last_words: called, in another thread, before the process is ended.
        grace: seconds that the main thread has to end by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signalled = threading.Event()
    watcher = threading.Thread(
        target=_watch,
        args=(reader, signalled, grace, last_words),
        name="mxtorq-interrupts",
        daemon=True,
    )
    watcher.start()
    try:
        yield
    finally:
        if not signalled.is_set():
            signal.set_wakeup_fd(before)
            os.close(writer)  # which ends the thread
            watcher.join()
            os.close(reader)


def end_now() -> NoReturn:
    """End the process. Python's own way out waits for threads and takes down every library, which
    can be many seconds on a busy machine, while no thread of ours may run any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            continue
    os._exit(EXIT_CODE)


def _watch(
    reader: int, signalled: threading.Event, grace: float, last_words: Callable[[], None]
) -> None:
    if not _signal(reader):
        return
    signalled.set()
    if select.select([reader], [], [], grace)[0]:
        _signal(reader)
    try:
        last_words()
    finally:
        end_now()


def _signal(reader: int) -> bool:
    """Wait for one of our signals; False where none will come any more."""
    while number := os.read(reader, 1):
        if number[0] in _OURS:
            return True
    return False
