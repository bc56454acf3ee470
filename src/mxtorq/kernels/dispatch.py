"""Which backend does the work: ``auto`` takes the fastest that is there.

    eager     torch alone, in chunks that fit a core's cache; every device, nothing to install
    numba     CPUs; `pip install 'mxtorq[numba]'`
    triton    NVIDIA and AMD GPUs; `pip install 'mxtorq[triton]'`

All give the same bits, but for the sums of rotations, which each backend rounds in its own order.
So the choice is not part of a recipe. A backend that was named and cannot serve is an error, never
replaced by another.
"""

from collections.abc import Container
from enum import StrEnum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats import scales
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, check_out
from mxtorq.formats.scales import Scale, ScaledE2M1
from mxtorq.kernels import eager


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


def pick_able(backend: Backend | str, device: torch.device, able: Container[Backend]) -> Backend:
    """As `pick`, for work that not every backend can do: ``auto`` then stays with EAGER.

    Raises:
        UsageError: as `pick`, and where the backend that was named is none of ``able``.
    """
    chosen = pick(backend, device)
    if chosen is Backend.EAGER or chosen in able:
        return chosen
    if backend != Backend.AUTO:
        raise UsageError(
            asked=f"the backend {chosen} for a dtype, a number of matrices or an order that it has "
            "no kernel for",
            found="a kernel for other cases of the same function",
            why="a backend that was named is not replaced by another",
            todo="use backend='auto', which computes this in eager torch",
        )
    return Backend.EAGER


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
    result: MXFP4 = _format(backend, values).quantize(values, scale)
    return result


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
    result: Tensor = _format(backend, values).fake_quantize(values, scale, out)
    return result


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
    able = () if dtype == torch.float64 else (Backend.NUMBA, Backend.TRITON)
    chosen = pick_able(backend, quantized.packed.device, able)
    result: Tensor = _format(chosen, quantized.packed).dequantize(quantized, dtype, out)
    return result


def rotate(
    values: Float[Tensor, "*rows d"],
    matrices: Float[Tensor, "m 32 32"],
    *,
    out: Float[Tensor, "*rows d"] | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Float[Tensor, "*rows d"]:
    """Each MX block times its matrix, in the dtype of ``values``; kernels serve float32.

    Args:
        values: what is rotated.
        matrices: one for all blocks, or d / 32 of them; cast to the dtype of ``values``.
        out: memory for the result.
        backend: who computes. Sums of 32 terms are rounded in the order of the backend.

    Raises:
        FormatError: 32 does not divide d, or ``out`` does not fit.
        UsageError: as `pick`.
    """
    plain = values.dtype == torch.float32 and not _wants_gradient(values)
    chosen = pick_able(backend, values.device, (Backend.NUMBA,) if plain else ())
    if chosen is Backend.NUMBA:
        from mxtorq.kernels.numba.rotate import rotate as fast

        return fast(values, matrices.float(), out)
    return eager.rotate(values, matrices, out)


def rotate_fake_quantize(
    values: Float[Tensor, "*rows d"],
    matrices: Float[Tensor, "m 32 32"],
    scale: ScaleRule = ScaleRule.FLOOR,
    *,
    out: Float[Tensor, "*rows d"] | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Float[Tensor, "*rows d"]:
    """`rotate` in float32, then `fake_quantize`, in the dtype of ``values`` (float32, bfloat16).

    Raises:
        FormatError: as `rotate` and `fake_quantize`.
        UsageError: as `pick`.
    """
    chosen = pick_able(backend, values.device, _rotating(matrices))
    if chosen is Backend.NUMBA:
        from mxtorq.kernels.numba.rotate import rotate_fake_quantize as fast

        return fast(values, matrices.float(), scale, out)
    if chosen is Backend.TRITON:
        from mxtorq.kernels.triton import rotate as triton

        result = check_out(out, values.shape, values.dtype, values.device)
        return triton.rotate_fake_quantize(values, matrices[0], scale, None, result)
    return eager.rotate_fake_quantize(values, matrices, scale, out)


def rotate_quantize(
    values: Float[Tensor, "*rows d"],
    matrices: Float[Tensor, "m 32 32"],
    scale: ScaleRule = ScaleRule.FLOOR,
    *,
    backend: Backend | str = Backend.AUTO,
) -> MXFP4:
    """`rotate` in float32, then `quantize`.

    Raises:
        FormatError: as `rotate` and `quantize`.
        UsageError: as `pick`.
    """
    chosen = pick_able(backend, values.device, _rotating(matrices))
    if chosen is Backend.NUMBA:
        from mxtorq.kernels.numba.rotate import rotate_quantize as fast

        return fast(values, matrices.float(), scale)
    if chosen is Backend.TRITON:
        from mxtorq.kernels.triton import rotate as triton

        return triton.rotate_quantize(values, matrices[0], scale)
    return eager.rotate_quantize(values, matrices, scale)


def _rotating(matrices: Tensor) -> tuple[Backend, ...]:
    """Who rotates and rounds in one kernel; Triton's knows one matrix for all blocks."""
    return (Backend.NUMBA, Backend.TRITON) if len(matrices) == 1 else (Backend.NUMBA,)


def multiplies_packed(activations: Float[Tensor, "*tokens d"]) -> bool:
    """Whether `multiply_packed` is there for these, and faster than a dequantized weight."""
    if activations.dtype != torch.float32 or _wants_gradient(activations):
        return False
    if pick(Backend.AUTO, activations.device) is not Backend.NUMBA:
        return False
    from mxtorq.kernels.numba.matmul import LIMIT

    return activations.shape[:-1].numel() <= LIMIT


def multiply_packed(
    activations: Float32[Tensor, "*tokens d"], weight: MXFP4, bias: Tensor | None = None
) -> Float32[Tensor, "*tokens d_out"]:
    """x W^T + b on a CPU with W as its codes, without dequantizing it in memory.

    Raises:
        UsageError: numba is not installed.
    """
    pick(Backend.NUMBA, activations.device)
    from mxtorq.kernels.numba.matmul import multiply

    return multiply(activations, weight, bias)


def _wants_gradient(values: Tensor) -> bool:
    return torch.is_grad_enabled() and values.requires_grad


def _format(backend: Backend | str, values: Tensor) -> Any:
    """The module that has quantize, fake_quantize and dequantize."""
    homes = {
        Backend.EAGER: "mxtorq.formats.mxfp4",
        Backend.NUMBA: "mxtorq.kernels.numba.mxfp4",
        Backend.TRITON: "mxtorq.kernels.triton.mxfp4",
    }
    return import_module(homes[pick(backend, values.device)])
