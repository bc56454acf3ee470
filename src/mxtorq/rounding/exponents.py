"""The better of three neighbouring exponents for each block: legal E8M0 with less error.

A scale rule looks at a block's largest magnitude alone. Here the rule proposes exponent e, each of
e - 1, e and e + 1 is tried on all 32 values, and the one with the smallest sum of squared errors is
kept. For Gaussian blocks this takes OCP floor's relative error from .0132 to .0125, as good as the
best fixed threshold (MXAttention, arXiv 2607.24377), and unlike a threshold it never loses. It is
done once, offline, so it is for weights. Related: the MSE observer of MR-GPTQ (arXiv 2509.23202)
shrinks the scale in 100 steps under a norm of 2.4; those scales are no powers of two.

A tie goes to the rule's own exponent. An exponent under which a value of the block would leave
float32 is not taken while another one is left. Sums run in float64 and in one fixed order, so the
choice does not depend on layout, batch or device.
"""

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats import e2m1, e8m0
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import chunks
from mxtorq.formats.scales import Scale, block_scales
from mxtorq.formats.spec import E8M0_MAX
from mxtorq.kernels.dispatch import Backend, pick

_CHOICES = (1, 3)


def require_exponents(exponents: int) -> None:
    """Refuse a number of exponents that is neither 1 nor 3.

    Raises:
        UsageError: with what the two mean.
    """
    if exponents not in _CHOICES:
        raise UsageError(
            asked=f"exponents={exponents}",
            found="the choices 1 and 3",
            why="1 takes the rule's exponent, 3 searches it and its two neighbours",
            todo="pass exponents=1 or exponents=3",
        )


def require_scale(exponents: int, scale: Scale) -> None:
    """Refuse a search over exponents for scales that have none.

    Raises:
        UsageError: more than one exponent with a scale outside of the format.
    """
    if exponents > 1 and not isinstance(scale, ScaleRule):
        raise UsageError(
            asked=f"exponents={exponents} with the scale {scale}",
            found="a scale outside of the format",
            why="the search is over neighbouring E8M0 bytes, which such a scale does not have",
            todo=f"pass exponents=1, or one of the rules {', '.join(ScaleRule)}",
        )


def choose_scales(
    blocks: Float32[Tensor, "n 32"],
    scale: Scale,
    exponents: int,
    *,
    backend: Backend | str = Backend.AUTO,
) -> Float32[Tensor, " n"]:
    """The scale of each block: `block_scales` for one exponent, `search_exponents` for three.

    Raises:
        UsageError: as `require_scale`.
    """
    require_scale(exponents, scale)
    if exponents > 1 and isinstance(scale, ScaleRule):
        return search_exponents(blocks, scale, backend=backend)
    return block_scales(blocks, scale)


def search_exponents(
    blocks: Float32[Tensor, "n 32"], rule: ScaleRule, *, backend: Backend | str = Backend.AUTO
) -> Float32[Tensor, " n"]:
    """The power of two of least squared error among the rule's and its neighbours.

    Bytes stay within 0..254. NaN where a block holds NaN or Inf.
    """
    if pick(backend, blocks.device) is Backend.NUMBA:
        from mxtorq.kernels.numba import exponents

        return exponents.search_exponents(blocks, rule)
    scales = torch.empty(len(blocks), dtype=torch.float32, device=blocks.device)
    for here in chunks(blocks):
        scales[here] = _search(blocks[here], rule)
    return scales


def candidates(
    blocks: Float32[Tensor, "n 32"], rule: ScaleRule
) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"], Float32[Tensor, " n"]]:
    """The scales that are tried for each block: the rule's own, its half and its double.

    Bytes stay within 0..254, but for the NaN of a block that holds NaN or Inf.
    """
    own = e8m0.encode_amax(e8m0.magnitude_bits(blocks).amax(-1), rule)
    half, double = ((own.int() + step).clamp(0, E8M0_MAX).to(torch.uint8) for step in (-1, 1))
    return e8m0.decode(own), e8m0.decode(half), e8m0.decode(double)


def _search(blocks: Float32[Tensor, "n 32"], rule: ScaleRule) -> Float32[Tensor, " n"]:
    best, *others = candidates(blocks, rule)
    least = _squared_error(blocks, best)
    for scale in others:
        error = _squared_error(blocks, scale)
        better = error < least  # never where the rule's own scale is NaN, and so ``least``
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _squared_error(
    blocks: Float32[Tensor, "n 32"], scales: Float32[Tensor, " n"]
) -> Float64[Tensor, " n"]:
    """Exact up to the sum's rounding; Inf where a rounded value leaves float32."""
    scale = scales[:, None]
    rounded = e2m1.nearest(blocks / scale) * scale
    squares = (rounded.double() - blocks).square()
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        squares = squares[:, :half] + squares[:, half:]
    return squares[:, 0]
