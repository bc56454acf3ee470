"""What a way of rounding is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from mxtorq.errors import ModelError, UsageError
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import Scale, ScaledE2M1
from mxtorq.kernels.dispatch import Backend


class Rounding(ABC):
    """Subclasses are frozen dataclasses of options."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    needs_hessian: ClassVar[bool] = True
    """Whether `round` asks for the Hessian."""

    @property
    def sees_rounded_inputs(self) -> bool:
        """Whether ``hessian`` shall be that of the inputs *after* their own rounding to MXFP4."""
        return False

    @property
    def corrects_inputs(self) -> bool:
        """Whether weights shall be changed by `correction` before they are rounded."""
        return False

    def correction(
        self,
        plain: Float64[Tensor, "n n"],
        rounded: Float64[Tensor, "n n"],
        cross: Float64[Tensor, "n n"],
    ) -> Float64[Tensor, "n n"]:
        """What a block of columns of transformed weights is multiplied with, so that outputs from
        rounded inputs are near those from plain ones; arguments as those of `rounding.correction`.
        """
        raise NotImplementedError

    @property
    def compensates(self) -> bool:
        """Whether an error is made good in weights that are not rounded yet."""
        return False

    def check(self, scale: Scale) -> None:
        """Refuse a kind of scale that these options cannot serve, before any work.

        Raises:
            UsageError: with what would work.
        """

    @abstractmethod
    def round(
        self,
        weight: Float32[Tensor, "d_out d"],
        hessian: Callable[[], Tensor],
        scale: Scale,
        *,
        backend: Backend | str = Backend.AUTO,
    ) -> MXFP4 | ScaledE2M1:
        """Choose codes for the stacked, transformed weights of a site.

        Args:
            weight: W T^-T of all linears that read the site, one below the other.
            hessian: gives the second moment [d, d] of the site's transformed inputs, float64. A
                function, because transforming a Hessian costs more than rounding to nearest does.
            scale: how block scales are chosen.
            backend: who computes where there is a choice; the bits are the same.

        Raises:
            UsageError: as `check`, or the backend cannot serve.
            ModelError: the weight holds NaN or Inf.
            FormatError: 32 does not divide d.
        """

    def round_(
        self,
        weight: Float32[Tensor, "d_out d"],
        hessian: Callable[[], Tensor],
        scale: Scale,
    ) -> MXFP4 | ScaledE2M1:
        """As `round`, for a Hessian that nobody else needs: what ``hessian`` gives may be
        overwritten."""
        return self.round(weight, hessian, scale)


def require_finite(weight: Float32[Tensor, "d_out d"]) -> None:
    """Refuse a weight that no code stands for.

    Raises:
        ModelError: it holds NaN or Inf.
    """
    if bool(weight.sum().isfinite()):  # much cheaper than a look at each number; may overflow
        return
    bad = ~torch.isfinite(weight)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ModelError(
            asked=f"codes for a weight {tuple(weight.shape)}",
            found=f"{int(bad.sum())} NaN or Inf, the first in row {row}, column {column}",
            why="E2M1 has neither, and one of them makes its whole block NaN",
            todo="look for them in the model, then for a transform that is nearly singular",
        )


def require_moment(
    moment: Float64[Tensor, "..."], weight: Float32[Tensor, "d_out d"]
) -> Float64[Tensor, "d d"]:
    """The Hessian, if it is one of this weight's columns.

    Raises:
        UsageError: it is not [d, d].
        ModelError: it holds NaN or Inf.
    """
    width = weight.shape[1]
    if moment.shape != (width, width):
        raise UsageError(
            asked=f"GPTQ of a weight {tuple(weight.shape)}",
            found=f"a Hessian {tuple(moment.shape)}",
            why="it holds one moment for each pair of the weight's columns",
            todo=f"pass the Hessian [{width}, {width}] of the same, transformed site",
        )
    # A sum costs a tenth of a look at each number, and may overflow.
    if not bool(moment.sum().isfinite()) and not bool(torch.isfinite(moment).all()):
        raise ModelError(
            asked=f"GPTQ with a Hessian {tuple(moment.shape)}",
            found="NaN or Inf in it",
            why="some calibration input was not finite",
            todo="evaluate the model without rounding first, or round with rtn",
        )
    return moment
