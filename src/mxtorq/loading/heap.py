"""What the C library's heap keeps of memory that was given back to it.

glibc serves pieces of up to 32 MB from heaps of its own, one for each thread that asks, and returns
only their ends to the system. A layer's weights and codes are such pieces; between others that stay
they leave holes, and a process that works through a model grows by some of every layer (at 24
layers of 11 million weights from 0.5 to 1.9 GB, with nothing alive). `trim` returns the holes; it
takes milliseconds. Other C libraries have no such call, and need none or keep what they keep.
"""

import ctypes
from functools import cache
from typing import Any


def trim() -> None:
    """Give free pages of all heaps back to the system, where the C library can."""
    function = _malloc_trim()
    if function is not None:
        function(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or no Unix
        return None
