"""WUSH: the transform that gives inputs and weights of a block the same, equalised second moment.

Per block of 32 (WUSH, arXiv 2512.00956v3), with A the second moment of the inputs and B that of the
weight's rows, errors of W4A4 grow with tr(T^T A T) tr(T^-1 B T^-T). Cauchy-Schwarz bounds that from
below by (tr (A^1/2 B A^1/2)^1/2)^2, and a closed form attains it: with A = U^T U, B = L L^T and the
singular values U L = V diag(S) Q^T,

    T = L Q diag(S^-1/2) H = U^-1 V diag(S^1/2) H,      T^T A T = T^-1 B T^-T = H diag(S) H.

H is Sylvester's matrix: it makes the diagonal constant, which S alone ("WUS") does not. Row vectors
here: the paper's T is the transpose.

Faithful: the formula, float64, one T for all linears that share an input, a damping of 1 % of the
mean diagonal. Decided here: A and B are both damped, as in an apparently later state of the public
repository (IST-DASLab/WUSH); its first release damped S in place of B. And *whose curvature A is*.
The first release takes the diagonal block of the upper Cholesky factor of the whole Hessian, what
is left of A while earlier blocks can still compensate: it suits GPTQ from the last block to the
first and is blind to the rounding of inputs. The later code keeps such a curvature for weight-only
and takes the block's own A for W4A4: the default here. On synthetic data with rounded inputs the
block's own lost 1 to 6 % less, with RTN and with GPTQ in either order; with exact inputs and GPTQ
neither was ahead throughout (docs/methods/wush.md).
Left out: both fit T inside of GPTQ, to weights that carry the errors of other blocks already; here
transforms are fitted before rounding, to the weights as they are.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float64
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.base import SiteStatistics, TransformMethod
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.hadamard import sylvester

SMALLEST_DAMPING = 1e-6
"""Rounding moves the eigenvalues of a Hessian of width d by up to d^2 eps of its mean diagonal,
5e-8 for d = 14,336: with this much added a Cholesky factor always exists."""


class Curvature(StrEnum):
    """Which second moment of its inputs a block is fitted to."""

    BLOCK = "block"
    """Its own."""
    CONDITIONAL = "conditional"
    """What is left of it while earlier blocks can compensate: GPTQ from the last block to the
    first, weights alone."""


@dataclass(frozen=True, kw_only=True)
class WUSH(TransformMethod):
    """Closed-form transform of each block from both second moments."""

    hadamard: bool = True
    """False is the paper's ablation "WUS"."""
    curvature: Curvature = Curvature.BLOCK
    damping: float = 0.01
    """Part of the mean diagonal that is added to both second moments."""

    def __post_init__(self) -> None:
        if not SMALLEST_DAMPING <= self.damping <= 1:
            raise UsageError(
                asked=f"{self}",
                found=f"damping={self.damping}",
                why="the second moments of few tokens or of few outputs are singular, and a "
                "damping above 1 leaves little of them",
                todo=f"choose one between {SMALLEST_DAMPING} and 1; the paper's is 0.01",
            )

    @property
    def needs_compensation(self) -> bool:
        return self.curvature is Curvature.CONDITIONAL

    def fit(self, statistics: SiteStatistics, seed: int) -> BlockMatrices:
        if self.curvature is Curvature.BLOCK:
            inputs = damped(input_moments(statistics), self.damping)
        else:
            inputs = conditional_moments(statistics.hessian, self.damping)
        matrices = equalize_moments(inputs, damped(weight_moments(statistics), self.damping))
        if self.hadamard:
            matrices = matrices @ sylvester(BLOCK).to(matrices.device)
        return BlockMatrices(matrices)


def input_moments(statistics: SiteStatistics) -> Float64[Tensor, "blocks 32 32"]:
    """The second moment of the inputs of each block: the diagonal blocks of the Hessian."""
    return diagonal_blocks(statistics.hessian)


def weight_moments(statistics: SiteStatistics) -> Float64[Tensor, "blocks 32 32"]:
    """The second moment of the weight's rows in each block, W_b^T W_b / d_out."""
    rows = statistics.weight.unflatten(-1, (-1, BLOCK)).transpose(0, 1)
    moments: Tensor = rows.mT @ rows / rows.shape[1]
    return moments


def diagonal_blocks(
    matrix: Float64[Tensor, "d d"], size: int = BLOCK
) -> Float64[Tensor, "blocks n n"]:
    """The blocks of that size on the diagonal."""
    blocks = matrix.unflatten(0, (-1, size)).unflatten(-1, (-1, size))
    diagonal: Tensor = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return diagonal


def damped(moments: Float64[Tensor, "*b n n"], damping: float) -> Float64[Tensor, "*b n n"]:
    """Moments + damping * mean diagonal * I. A moment that is zero everywhere becomes I.

    Zero inputs or weights are kept by any transform: with I their block gets what fits the other
    side alone, and plain H when both are zero.
    """
    level = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(level > 0, damping * level, 1.0)
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return moments + added[..., None, None] * identity


def conditional_moments(
    hessian: Float64[Tensor, "d d"], damping: float
) -> Float64[Tensor, "blocks 32 32"]:
    """U_bb^T U_bb for the damped H = U^T U: each block's Schur complement of all blocks before it.

    The smallest E |x_b - f(x of earlier blocks)|^2 over linear f, as a matrix.
    """
    upper = torch.linalg.cholesky(damped(hessian, damping), upper=True)
    blocks = diagonal_blocks(upper)
    return blocks.mT @ blocks


def equalize_moments(
    inputs: Float64[Tensor, "blocks n n"], weights: Float64[Tensor, "blocks n n"]
) -> Float64[Tensor, "blocks n n"]:
    """T = L Q diag(S^-1/2): T^T A T = T^-1 B T^-T = diag(S), S in descending order.

    Both moments must be positive definite. S is taken from the product of the factors and not from
    L^T A L, whose eigenvalues are squares and lose half of the digits.
    """
    upper = torch.linalg.cholesky(inputs, upper=True)
    lower = torch.linalg.cholesky(weights)
    _, singular, right = torch.linalg.svd(upper @ lower)
    matrices: Tensor = lower @ right.mT * singular.rsqrt()[:, None, :]
    return matrices
