"""The decorator of every numba kernel, and why its options are what they are.

``nogil`` lets the thread pool run kernels side by side. ``cache`` keeps machine code between
processes, beside the source or in the user's cache folder. ``error_model="numpy"`` drops the checks
for a division by zero that Python asks for. Fast math stays off: no product is fused with a sum, no
sum is reordered, and NaN means NaN, so a kernel has the bits of the same lines in NumPy.

numba notices that a kernel's own file has changed, not that what it calls from another file has. So
kernels call kernels of their own file, and the vocabulary of `lanes` alone beside them: whoever
edits that deletes the ``__pycache__`` here.
"""

import inspect
from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function of scalars and arrays when it is first called with their types."""
    plain = inspect.unwrap(function)  # without what a type checker of the tests put around it
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(plain)
    except RuntimeError:  # no folder that a cache could be written to
        return njit(nogil=True, error_model="numpy")(plain)
