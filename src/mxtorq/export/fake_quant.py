"""Fake quantization: the values of an MXFP4 model as plain BF16 weights, for any evaluator.

A plain transformers folder whose linears hold what their codes stand for. An element times a power
of two has two significant bits and fits BF16 exactly, down to 2^-128; values of 2^128 and more
become Inf there, and a block of NaN stays one: both are refused.

What it is not: W4A4. A plain model has no place where its inputs would be rounded, so such a folder
measures the weights alone, and its figures are those of W4A16 with unrounded inputs.

Nor can a plain model transform its inputs. Where a site has a transform T the stored weight is
W' = Q(W T^-T), and W' T^T is the same linear in the original coordinates. It has more significant
bits than BF16 keeps, so it is rounded once more (relative error up to 2^-9), and only when the
caller says so.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from mxtorq.errors import FormatError, UsageError
from mxtorq.export.packed import Packed
from mxtorq.formats.mxfp4 import MXFP4, dequantize
from mxtorq.transforms.base import Transform

_PANEL = 512  # rows of the identity that are transformed together


def fake_quantized(codes: MXFP4, name: str) -> Tensor:
    """The values of a linear in BF16, exact.

    Raises:
        FormatError: a value lies beyond BF16, or a scale is NaN.
    """
    return _finite(dequantize(codes, torch.bfloat16), name)


def untransformed(codes: MXFP4, transform: Transform, name: str) -> Tensor:
    """W' T^T of a linear, computed in float64 and rounded to BF16 through float32.

    Raises:
        FormatError: as `fake_quantized`.
    """
    weight = dequantize(codes, torch.float64)
    return _finite(undo(weight, transform).float().bfloat16(), name)


def undo(weight: Float64[Tensor, "d_out d"], transform: Transform) -> Float64[Tensor, "d_out d"]:
    """W' T^T, the inverse of `Transform.fuse`: panel by panel of T, which is never whole."""
    result = torch.empty_like(weight)
    eye = torch.eye(transform.width, dtype=torch.float64)
    for start in range(0, transform.width, _PANEL):
        rows = transform.apply(eye[start : start + _PANEL])
        result[:, start : start + _PANEL] = weight @ rows.T
    return result


def require_plain(model: Packed, *, undo_transforms: bool) -> None:
    """Refuse transforms that nobody asked to undo.

    Raises:
        UsageError: so it is.
    """
    if not model.online or undo_transforms:
        return
    kinds = sorted({entry.kind for entry in model.online})
    raise UsageError(
        asked=f"{model.folder} as a plain BF16 model",
        found=f"{len(model.online)} inputs with a transform ({', '.join(kinds)})",
        why="a plain model cannot transform its inputs; in the original coordinates the weights "
        "are no MXFP4 values any more and have to be rounded to BF16 once more",
        todo="pass --undo-transforms if weights with that extra rounding (up to 2^-9 of each) are "
        "what you want to evaluate; `mxtorq evaluate` computes the real W4A4",
    )


def _finite(values: Tensor, name: str) -> Tensor:
    if bool(torch.isfinite(values).all()):
        return values
    raise FormatError(
        asked=f"the values of {name} in BF16",
        found="a value of 2^128 or more, or a scale byte of 255 (NaN)",
        why="BF16 ends below 2^128, and a model with Inf or NaN computes nothing",
        todo="quantize again from undamaged weights",
    )
