"""WUSH for what an error does to the layer, in blocks of 32 or more, each at its best scale.

WUSH (arXiv 2512.00956v3) minimises the errors of a linear's own outputs: the rounding noise of the
inputs x' = x T is white in a block, of the mean size of x', and reaches the outputs through
W' = W T^-T, so that tr(T^T A T) tr(T^-1 B T^-T) is what counts, with A the second moment of the
inputs and B = W^T W / d_out. But not all outputs are alike. With g the gradient of the layer's
output along a random direction, with respect to the input of the site (`calibration.gradients`), an
error e costs E (e g^T)^2: the same product, with

    B = E[g^T g]

and the same closed form. Where a layer is linear in the site's outputs and nothing follows, g is a
random combination of W's rows and B is WUSH's. In front of q, k and v it is far from it: which rows
of q and k matter is attention's affair.

Blocks of 64 or 128 (Sylvester's H of that size) mix what several MX blocks hold; that costs as many
multiply-adds a channel. The paper's bound holds for any size; whether the noise is white across MX
blocks, as it assumes, is left to measurement.

The scale. A power-of-two scale cuts a block's values at 6 scales, and where between two powers the
largest one falls is decided by nothing: s x' for a factor s is as good to the linear, and not to
the rounding. For each MX block the best of s = 1, 2^(1/4), 2^(1/2), 2^(3/4) on the sample is
multiplied into T, at no price at run time.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.formats.scales import Scale
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import fake_quantize
from mxtorq.transforms.base import SiteStatistics
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.wush import damped, diagonal_blocks, equalize_moments

PHASES = (0.0, 0.25, 0.5, 0.75)
"""Logarithms of the factors that are tried, to base 2."""


class BlockMoments(NamedTuple):
    """Second moments within blocks of one size."""

    inputs: Float64[Tensor, "blocks n n"]
    """A, of the inputs."""
    errors: Float64[Tensor, "blocks n n"]
    """B, of the rows g: what an error of an input costs."""

    def within(self, size: int) -> "BlockMoments":
        """Those of smaller blocks: they lie on the diagonals of these."""
        return BlockMoments(
            *(torch.cat([diagonal_blocks(each, size) for each in side]) for side in self)
        )


def moments_of(
    statistics: SiteStatistics, metric: Float[Tensor, "rows d"], size: int
) -> BlockMoments:
    """Both moments in blocks of ``size``, which divides the width.

    Args:
        statistics: of the site.
        metric: rows g; an error e of an input costs the mean of (e g^T)^2.
        size: of the blocks.
    """
    inputs = diagonal_blocks(statistics.hessian, size).clone()  # not to keep what it is a view of
    return BlockMoments(inputs, block_moments(metric, size))


def layer_aware(moments: BlockMoments, damping: float) -> BlockMatrices:
    """The transform in blocks of the moments' size.

    ``damping`` is the part of the mean diagonal that is added to both.
    """
    matrices = equalize_moments(*(damped(side, damping) for side in moments))
    return BlockMatrices(matrices @ sylvester(matrices.shape[-1]).to(matrices.device))


def layer_smooth(
    statistics: SiteStatistics, metric: Float[Tensor, "rows d"], damping: float
) -> Diagonal:
    """The best diagonal by the same measure: factors (B_cc / A_cc)^(1/4).

    Of all diagonal D the product of sum_c A_cc D_cc^2 and sum_c B_cc / D_cc^2 is least at this one
    (Cauchy-Schwarz); both sides get the mean squares sqrt(A_cc B_cc).
    """
    sides = []
    for squares in (statistics.hessian.diagonal(), metric.double().square().mean(0)):
        level = squares.mean()
        sides.append(squares + (damping * level if level > 0 else 1.0))
    return Diagonal((sides[1] / sides[0]) ** 0.25)


def block_moments(rows: Float[Tensor, "rows d"], size: int) -> Float64[Tensor, "blocks n n"]:
    """The second moment of some rows within each block of ``size`` columns.

    In float64: what sums in float32 are off by is more than the smallest damping makes good.
    """
    blocks = rows.unflatten(-1, (-1, size)).unbind(-2)
    return torch.stack([part.mT @ part for part in map(Tensor.double, blocks)]) / len(rows)


def at_best_scale(
    transform: BlockMatrices,
    moments: BlockMoments,
    sample: Float[Tensor, "sampled d"],
    scale: Scale,
) -> BlockMatrices:
    """The transform with the columns of each MX block multiplied by its best factor.

    Args:
        transform: of blocks of 32 or more.
        moments: in the same blocks.
        sample: inputs.
        scale: by which inputs will be rounded.
    """
    values = transform.apply(sample)
    size = transform.matrices.shape[-1]
    back = torch.linalg.inv(transform.matrices)
    whole = back @ moments.errors @ back.mT
    each = torch.cat([diagonal_blocks(block) for block in whole]).float()
    factors = torch.tensor([2.0**phase for phase in PHASES])
    costs = torch.stack([_costs(values, float(f), each, scale) for f in factors])
    chosen = factors.to(costs.device)[costs.argmin(0)].double()  # the first of equals
    columns = chosen.repeat_interleave(BLOCK).view(-1, 1, size)
    return BlockMatrices(transform.matrices * columns)


def _costs(values: Tensor, factor: float, moments: Tensor, scale: Scale) -> Float64[Tensor, " b"]:
    """What the rounding of each MX block costs when inputs are multiplied by a factor."""
    scaled = values * factor
    errors = ((fake_quantize(scaled, scale) - scaled) / factor).unflatten(-1, (-1, BLOCK))
    blocks = errors.transpose(0, 1)
    costs: Tensor = ((blocks @ moments) * blocks).double().sum((1, 2))
    return costs
