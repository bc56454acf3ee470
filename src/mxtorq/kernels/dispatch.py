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

import torch

from mxtorq.errors import UsageError


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
