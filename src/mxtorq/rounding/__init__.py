"""From a transformed weight, and maybe a Hessian, to MXFP4 codes.

Lives here: one file a way of rounding; each takes tensors and returns `MXFP4`.
Does not live here: modules, or the choice of the transform.

To add one: a file with a function of `Rounding`'s signature, and a line in `ROUNDINGS`.
"""

from collections.abc import Callable
from typing import Protocol

from jaxtyping import Float32
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.rounding.rtn import round_to_nearest


class Rounding(Protocol):
    """A way to round a weight; ``hessian()`` gives its inputs' second moment [d, d], in float64.

    It is a function because rotating a Hessian costs more than rounding to nearest does.
    """

    def __call__(
        self,
        weight: Float32[Tensor, "d_out d"],
        hessian: Callable[[], Tensor],
        rule: ScaleRule,
    ) -> MXFP4: ...


ROUNDINGS: dict[str, Rounding] = {"rtn": round_to_nearest}
"""Ways of rounding by the name that a recipe and the command line use."""
