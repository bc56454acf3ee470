"""From a transformed weight, and maybe a Hessian, to codes.

Lives here: one file a way of rounding; each takes tensors and returns codes with their scales. What
they share is `base`, and `exponents` for scales that are searched.
Does not live here: modules, or the choice of the transform.

To add one: a frozen dataclass of its options that subclasses `Rounding`, and a line in `ROUNDINGS`.
"""

from mxtorq.rounding.base import Rounding
from mxtorq.rounding.gptq import GPTQ
from mxtorq.rounding.rtn import RTN

ROUNDINGS: dict[str, type[Rounding]] = {"rtn": RTN, "gptq": GPTQ}
"""Ways of rounding by the name that a recipe and the command line use."""
