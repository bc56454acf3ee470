"""Which backend does the work: ``auto`` takes the fastest that is there.

    eager     torch alone, in chunks that fit a core's cache; every device, nothing to install
    numba     CPUs; `pip install 'mxtorq[numba]'`
    triton    NVIDIA and AMD GPUs; `pip install 'mxtorq[triton]'`

All give the same bits, so the choice is not part of a recipe. A backend that was named and cannot
serve is an error, never replaced by another.
"""

from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats import mxfp4, scales
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import Scale, ScaledE2M1


class Backend(StrEnum):
    """Who computes."""

    AUTO = "auto"
    EAGER = "eager"
    NUMBA = "numba"
    TRITON = "triton"


_DEVICES = {Backend.NUMBA: "cpu", Backend.TRITON: "cuda"}
"""The device type that a compiled backend works on (AMD GPUs are ``cuda`` to torch too)."""


@cache
def _installed(backend: Backend) -> bool:
    return find_spec(backend.value) is not None


def pick(backend: Backend | str, device: torch.device) -> Backend:
    """The backend for work on a device: EAGER, NUMBA or TRITON.

    Raises:
        UsageError: there is no backend of that name, it is not installed, or it does not serve the
            device.
    """
    try:
        asked = Backend(backend)
    except ValueError:
        raise UsageError(
            asked=f"the backend {backend!r}",
            found=f"the backends {', '.join(Backend)}",
            why="nothing else computes here",
            todo="leave it out, or pass one of these",
        ) from None
    if asked is Backend.AUTO:
        for name, kind in _DEVICES.items():
            if device.type == kind and _installed(name):
                return name
        return Backend.EAGER
    if asked is Backend.EAGER:
        return asked
    if not _installed(asked):
        raise UsageError(
            asked=f"the backend {asked}",
            found=f"no package of the name {asked}",
            why="it compiles the kernels",
            todo=f"pip install 'mxtorq[{asked}]', or use backend='auto'",
        )
    if device.type != _DEVICES[asked]:
        raise UsageError(
            asked=f"the backend {asked} for a tensor on {device}",
            found=f"kernels for {_DEVICES[asked]} devices",
            why="a kernel reads the memory of its own device",
            todo="move the tensor, or use backend='auto'",
        )
    return asked


def quantize(
    values: Float[Tensor, "*rows d"],
    scale: Scale = ScaleRule.FLOOR,
    *,
    backend: Backend | str = Backend.AUTO,
) -> MXFP4 | ScaledE2M1:
    """A tensor rounded to nearest: MXFP4 under a rule of the format, else E2M1 under other scales.

    Raises:
        FormatError: as `formats.mxfp4.quantize`.
        UsageError: as `pick`.
    """
    if not isinstance(scale, ScaleRule):
        return scales.quantize(values, scale)
    return _format(backend, values).quantize(values, scale)


def fake_quantize(
    values: Float[Tensor, "*rows d"],
    scale: Scale = ScaleRule.FLOOR,
    *,
    out: Float[Tensor, "*rows d"] | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Float[Tensor, "*rows d"]:
    """The values of `quantize`, in the dtype of ``values``.

    Raises:
        FormatError: as `formats.mxfp4.fake_quantize`.
        UsageError: as `pick`.
    """
    if not isinstance(scale, ScaleRule):
        return scales.fake_quantize(values, scale, out)
    return _format(backend, values).fake_quantize(values, scale, out)


def dequantize(
    quantized: MXFP4 | ScaledE2M1,
    dtype: torch.dtype = torch.float32,
    *,
    out: Float[Tensor, "*rows d"] | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Float[Tensor, "*rows d"]:
    """The values of a quantized tensor, exact; ``dtype`` is for MXFP4 alone.

    Raises:
        FormatError: as `formats.mxfp4.dequantize`.
        UsageError: as `pick`.
    """
    if isinstance(quantized, ScaledE2M1):
        return scales.dequantize(quantized)
    chosen: Backend | str = Backend.EAGER if dtype == torch.float64 else backend
    return _format(chosen, quantized.packed).dequantize(quantized, dtype, out)


def _format(backend: Backend | str, values: Tensor) -> ModuleType:
    """The module that has quantize, fake_quantize and dequantize."""
    chosen = pick(backend, values.device)
    if chosen is Backend.NUMBA:
        from mxtorq.kernels.numba import mxfp4 as fast

        return fast
    if chosen is Backend.TRITON:
        from mxtorq.kernels.triton import mxfp4 as fast

        return fast
    return mxfp4
