"""The decorator of every Triton kernel, the options of every launch, and the checks before one.

``enable_fp_fusion=False``: no product is fused with a sum, so a kernel has the bits of the same
lines in eager torch. Triton's own default depends on the release, so it is said at each launch.
Triton reads a kernel's source text; what a type checker of the tests put around the function is
taken off first. A kernel's arguments are pointers and integers: bfloat16 travels as int16 and
float32 as int32 wherever bits matter, since the interpreter converts bfloat16 wrongly (subnormals
become 0, rounding is not to nearest; `tl.dot` multiplies the bits as integers) and a GPU may flush
subnormals in a conversion.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from mxtorq.errors import UsageError

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Passed to every launch."""

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function of pointers and numbers when it is first launched with their types."""
    return triton.jit(inspect.unwrap(function))


def bits(tensor: Tensor) -> Tensor:
    """A float32 or bfloat16 tensor as integers of its width; any other dtype as it is."""
    return tensor.detach().view(_BITS.get(tensor.dtype, tensor.dtype))


def on_device(tensor: Tensor) -> Any:
    """The context in which a launch goes to the tensor's device (none for the interpreter)."""
    return torch.cuda.device_of(tensor)


def result(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``out``, or a new tensor where there is none.

    Raises:
        UsageError: ``out`` cannot take the result as it is.
    """
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    found = (tuple(out.shape), out.dtype, out.device, out.is_contiguous())
    if found != (tuple(shape), dtype, device, True):
        raise UsageError(
            asked=f"a result in out={tuple(out.shape)} {out.dtype} on {out.device}",
            found=f"a result {tuple(shape)} {dtype} on {device}",
            why="a kernel writes contiguous memory and converts nothing",
            todo="pass a contiguous tensor of that shape, dtype and device, or none",
        )
    return out
