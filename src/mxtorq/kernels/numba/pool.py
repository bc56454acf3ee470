"""Rows over threads: a pool of Python threads around kernels that release the GIL.

There is no second OpenMP beside torch's: two of them in one process wait for each other in spinning
barriers. The number of threads is torch's, `torch.set_num_threads` rules both.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch


@cache
def _executor(process: int) -> ThreadPoolExecutor:
    # Threads do not survive a fork: a child process gets a pool of its own.
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="mxtorq")


def over_rows(work: Callable[[int, int], object], rows: int, least: int = 1) -> None:
    """``work(start, stop)`` on consecutive parts of ``range(rows)``, a part a thread.

    Args:
        work: must release the GIL, and must not care which parts it is given.
        rows: how many there are.
        least: rows that are worth a thread's start (some ten microseconds).

    Raises:
        Exception: what ``work`` raised, once every part has ended.
    """
    parts = max(1, min(torch.get_num_threads(), rows // max(1, least)))
    edges = [rows * part // parts for part in range(parts + 1)]
    others = [
        _executor(os.getpid()).submit(work, start, stop)
        for start, stop in pairwise(edges[1:])
    ]
    try:
        work(0, edges[1])
    finally:
        failed = [error for future in others if (error := future.exception())]
    if failed:
        raise failed[0]
