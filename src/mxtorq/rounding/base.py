"""What a way of rounding is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Float32
from torch import Tensor

from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import Scale, ScaledE2M1


class Rounding(ABC):
    """Subclasses are frozen dataclasses of options."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def sees_rounded_inputs(self) -> bool:
        """Whether ``hessian`` shall be that of the inputs *after* their own rounding to MXFP4."""
        return False

    def check(self, scale: Scale) -> None:
        """Refuse a scale that this rounding cannot work under, before any work.

        Raises:
            UsageError: with what would work.
        """

    @abstractmethod
    def round(
        self, weight: Float32[Tensor, "d_out d"], hessian: Callable[[], Tensor], scale: Scale
    ) -> MXFP4 | ScaledE2M1:
        """Choose codes for the stacked, transformed weights of a site.

        Args:
            weight: W T^-T of all linears that read the site, one below the other.
            hessian: gives the second moment [d, d] of the site's transformed inputs, float64. A
                function, because transforming a Hessian costs more than rounding to nearest does.
            scale: how block scales are chosen.
        """
