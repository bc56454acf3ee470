"""Round to nearest: every weight to the closest code under its block's scale.

The Hessian is not asked for. With ``exponents=3`` each block's scale is the best of the rule's
exponent and its two neighbours by squared error (`exponents`); the error of no block rises, and the
result is as legal as before. It is what "direct" rows of tables mean, and what every other rounding
is measured against.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float32
from torch import Tensor

from mxtorq.formats import e2m1
from mxtorq.formats.mxfp4 import MXFP4, as_blocks, chunks
from mxtorq.formats.scales import Scale, ScaledE2M1, assemble
from mxtorq.kernels.dispatch import Backend, quantize
from mxtorq.rounding.base import Rounding, require_finite
from mxtorq.rounding.exponents import choose_scales, require_exponents, require_scale


@dataclass(frozen=True, kw_only=True)
class RTN(Rounding):
    """Each weight for itself."""

    needs_hessian: ClassVar[bool] = False

    exponents: int = 1
    """Exponents that are tried for a block: 1 (the rule's) or 3 (its neighbours too)."""

    def __post_init__(self) -> None:
        require_exponents(self.exponents)

    def check(self, scale: Scale) -> None:
        require_scale(self.exponents, scale)

    def round(
        self,
        weight: Float32[Tensor, "d_out d"],
        hessian: Callable[[], Tensor],
        scale: Scale,
        *,
        backend: Backend | str = Backend.AUTO,
    ) -> MXFP4 | ScaledE2M1:
        self.check(scale)
        require_finite(weight)
        if self.exponents == 1:
            return quantize(weight, scale, backend=backend)
        blocks = as_blocks(weight)
        scales = choose_scales(blocks, scale, self.exponents, backend=backend)
        codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
        for here in chunks(blocks):
            codes[here] = e2m1.encode(blocks[here] / scales[here, None])
        return assemble(codes.view_as(weight), scales.view(len(weight), -1), scale)
