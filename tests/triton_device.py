"""Where the tests of Triton kernels run: in Triton's interpreter, or on a GPU, or not at all.

The interpreter is chosen by the environment before Triton is imported, so it needs a process of its
own: `tests/kernels/test_triton_interpreter.py` starts one over the other files. On a machine with a
GPU the same files run there as they are.
"""

import os

import pytest
import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    DEVICE = torch.device("cpu")
elif torch.cuda.is_available():
    DEVICE = torch.device("cuda")
else:
    pytest.skip(
        "no GPU here; these tests run in test_triton_interpreter.py", allow_module_level=True
    )


@triton.jit
def _count(out, stop):
    for number in range(stop):
        tl.store(out + number, number)


def _loops() -> bool:
    out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    try:
        _count[(1,)](out, 2)
    except Exception:  # TypeError in one release, wrapped in another
        return False
    return out.tolist() == [0, 1]


needs_loops = pytest.mark.skipif(
    not _loops(), reason="this Triton's interpreter takes no loop bound from an argument"
)
"""Triton 3.6 with NumPy 2.4: the interpreter calls ``int`` on arrays of one element."""


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal dtype, shape and bits, those of signed zeros too; any NaN is as good as another."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    found, expected = found.cpu(), expected.cpu()
    if not found.is_floating_point():
        return torch.equal(found, expected)
    nan = expected.isnan()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    bits = [t.contiguous().view(integers).masked_fill(nan, 0) for t in (found, expected)]
    return torch.equal(found.isnan(), nan) and torch.equal(*bits)
