"""Smoothing: channels that are large in the activations are divided, their weights multiplied.

SmoothQuant (arXiv 2211.10438, Eq. 4) moves the difficulty of a channel between the two operands,

    s_c = amax(x_c)^alpha / amax(w_c)^(1 - alpha),      T = diag(1 / s),

and DuQuant (arXiv 2406.01721) and DuQuant++ (arXiv 2604.17789) do the same before they rotate. Both
maxima and s have the floors of the released code. They keep a channel that is dead in calibration
finite: without them it would get s = 0.

Left open by the formula: whose weights w are when several linears read the input. SmoothQuant's
code takes the largest over all of them; DuQuant's takes one of them, q_proj for q, k and v, and
up_proj for gate and up. `Reader` has both.

It returns a `Diagonal` and stops there. As the first link of a site's transform that is merged into
the norm or linear that produces the channels, if each channel has a source of its own; at o_proj
under grouped-query attention it is one multiplication an element online. DuQuant++'s released code
divides that input in place, so that its GPTQ sees it divided twice; here it happens once.
"""

from enum import StrEnum

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.models.family import SiteName
from mxtorq.transforms.base import SiteStatistics
from mxtorq.transforms.diagonal import Diagonal

MAGNITUDE_FLOOR = 1e-5
"""Smaller maxima of activations and weights count as this (released code)."""

FACTOR_FLOOR = 1e-2
"""The smallest s (released code of DuQuant)."""


class Reader(StrEnum):
    """Which of the linears that share an input decide how large its weights are."""

    ALL = "all"
    RELEASED = "released"
    """q_proj for q, k and v; up_proj for gate and up, as in DuQuant's code."""


def smoothing_factors(
    amax: Float[Tensor, " d"], weight_amax: Float[Tensor, " d"], alpha: float
) -> Float64[Tensor, " d"]:
    """s of each channel: activations are divided by it, weights multiplied.

    Args:
        amax: the largest magnitude of each activation channel.
        weight_amax: the largest magnitude of each column of the weight.
        alpha: 0 makes all weight columns equally large, 1 all activation channels.
    """
    activation = amax.double().clamp(min=MAGNITUDE_FLOOR)
    weight = weight_amax.double().clamp(min=MAGNITUDE_FLOOR)
    return (activation**alpha / weight ** (1 - alpha)).clamp(min=FACTOR_FLOOR)


def smoothing(statistics: SiteStatistics, alpha: float, reader: Reader = Reader.ALL) -> Diagonal:
    """diag(1 / s) of a site, on the CPU."""
    weights = statistics.weights
    if reader is Reader.RELEASED:
        weights = weights[-1:] if statistics.name is SiteName.GATE_UP_IN else weights[:1]
    columns = torch.stack([weight.abs().amax(0).double().cpu() for weight in weights]).amax(0)
    return Diagonal(1 / smoothing_factors(statistics.amax.cpu(), columns, alpha))


def require_strength(alpha: float) -> None:
    """Refuse an alpha that is no share.

    Raises:
        UsageError: it is not between 0 and 1 (or NaN).
    """
    if not 0 <= alpha <= 1:
        raise UsageError(
            asked=f"smoothing with alpha = {alpha}",
            found="a number outside of 0 to 1",
            why="alpha is the share of the difficulty that moves from activations to weights",
            todo="choose 0.5 (SmoothQuant) or 0.6 (DuQuant)",
        )
