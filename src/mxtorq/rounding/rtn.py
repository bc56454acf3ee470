"""Round to nearest: every weight to the closest code under its block's scale, nothing else."""

from collections.abc import Callable

from jaxtyping import Float32
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, quantize


def round_to_nearest(
    weight: Float32[Tensor, "d_out d"], hessian: Callable[[], Tensor], rule: ScaleRule
) -> MXFP4:
    """`formats.mxfp4.quantize`; the Hessian is not asked for."""
    return quantize(weight, rule)
