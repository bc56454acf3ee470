"""The parts of HiRes' stage I, each for one block of 32: reference, interaction and balance.

Reference (arXiv 2609.34680v1, section 5 and appendix B). Under x' = x T both A, the inputs' second
moment, and B^-1, the inverse of the weights', become T^T (.) T. With DN(M) = M / det(M)^(1/32),

    M0 = (DN(A) + DN(B^-1)) / 2,      P = Cap_8(M0^-1/2),

so that, unless the cap acts, P whitens the mean of the two: P M0 P is a multiple of I. Cap_8
projects log-eigenvalues on {sum = 0, |.| <= log(8)/2}.

Interaction. K, of zero diagonal and norm 1/8 at the most, moves the coordinates P towards what
MXFP4 makes of them. With codes frozen at those of P, G = I + K turns the errors e = Q(.) - (.) into
e_x - K y and e_w + v K to first order. Entry ij alone changes the weighted squares

    h_i E(e_x,i - K_ij y_j)^2 + c_j E(e_w,j + v_i K_ij)^2

with c, h the mean squares of y and v: its minimum is p_ij / (2 h_i c_j) with the paper's
p_ij = h_i E(e_x,i y_j) - c_j E(v_i e_w,j). This is how the sign of the errors, which our source
leaves open, was decided.

Balance. A factor 2^u for each 4 channels that moves risk between the two sides; see `balance`.
"""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

CAP = 8.0
"""Largest ratio of two eigenvalues of P."""
RADIUS = 1 / 8
"""Of K's Frobenius norm, and of each exponent of the balance."""
GROUP = 4
"""Channels that share a factor of the balance."""

_RIDGE, _TINY = 0.01, 2.0**-30


def ridged(moments: Float64[Tensor, "*b n n"]) -> Float64[Tensor, "*b n n"]:
    """M + lambda I, lambda = 0.01 tr(M) / n + 2^-30: positive definite even where M is zero."""
    ridge = _RIDGE * moments.diagonal(dim1=-2, dim2=-1).mean(-1) + _TINY
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return moments + ridge[..., None, None] * identity


def unit_determinant(matrices: Float64[Tensor, "*b n n"]) -> Float64[Tensor, "*b n n"]:
    """M / |det M|^(1/n): DN."""
    logarithm = torch.linalg.slogdet(matrices).logabsdet / matrices.shape[-1]
    scaled: Tensor = matrices * torch.exp(-logarithm)[..., None, None]
    return scaled


def capped(values: Float64[Tensor, "*b n"], limit: float) -> Float64[Tensor, "*b n"]:
    """The nearest point (least squares) with sum 0 and no entry beyond +-limit.

    It is clip(values - t) for the t that makes the sum zero, which decreases in t: bisection.
    """
    low = values.amin(-1, keepdim=True) - limit
    high = values.amax(-1, keepdim=True) + limit
    for _ in range(64):  # more halvings than a float64 has bits
        middle = (low + high) / 2
        above = (values - middle).clamp(-limit, limit).sum(-1, keepdim=True) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (values - (low + high) / 2).clamp(-limit, limit)


def reference_moment(
    inputs: Float64[Tensor, "*b n n"], weights: Float64[Tensor, "*b n n"]
) -> Float64[Tensor, "*b n n"]:
    """M0 of positive definite second moments A and B."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(weights))
    return (unit_determinant(inputs) + unit_determinant(inverse)) / 2


def reference(
    inputs: Float64[Tensor, "*b n n"], weights: Float64[Tensor, "*b n n"]
) -> Float64[Tensor, "*b n n"]:
    """P = Cap_8(M0^-1/2): symmetric, of determinant 1, eigenvalues in [8^-1/2, 8^1/2]."""
    eigenvalues, vectors = torch.linalg.eigh(reference_moment(inputs, weights))
    logarithms = capped(-eigenvalues.log() / 2, math.log(CAP) / 2)
    root: Tensor = vectors * logarithms.exp()[..., None, :] @ vectors.mT
    return root


def interaction(
    inputs: Float64[Tensor, "n q"],
    weights: Float64[Tensor, "m q"],
    input_errors: Float64[Tensor, "n q"],
    weight_errors: Float64[Tensor, "m q"],
) -> Float64[Tensor, "q q"]:
    """K from signals and rounding errors in the coordinates P; zero with fewer than two rows.

    Each pair i < j has a reciprocal part (p_ij + p_ji)/sqrt 2 and a directed one, with the
    difference. A part is soft-thresholded by half the distance of its two folds (even and odd
    rows), which alone would leave the smaller where their signs agree and nothing elsewhere; by
    half the distance of what inputs and weights contribute; and a directed part by its excess over
    the reciprocal one. It is then divided by its curvature, and all of them are scaled into a ball.
    The parts are coordinates of an orthonormal basis: the ball bounds K's Frobenius norm.
    """
    c, h = inputs.square().mean(0), weights.square().mean(0)
    if min(len(inputs), len(weights)) < 2:
        return torch.zeros_like(c.outer(h))
    sides = torch.stack(
        (
            h[:, None] * _fold_moments(input_errors, inputs),
            -c * _fold_moments(weights, weight_errors),
        )
    )
    parts = torch.stack((sides + sides.mT, sides - sides.mT)) / math.sqrt(2)
    folds = parts.sum(1)  # [part, fold, i, j]
    gradient = folds.mean(1)
    size = gradient.abs()
    threshold = (folds[:, 0] - folds[:, 1]).abs() / 2
    threshold += (parts[:, 0] - parts[:, 1]).mean(1).abs() / 2
    threshold[1] += (size[1] - size[0]).clamp(min=0)
    kept = gradient.sign() * (size - threshold).clamp(min=0)

    curvature = (2 + 2.0**-8) * (h.outer(c) + c.outer(h)) / 2 + _TINY * h.mean() * c.mean()
    pairs = torch.where(kept == 0, 0.0, kept / curvature).triu(1)
    pairs = pairs * (RADIUS / pairs.norm().clamp(min=RADIUS))
    k: Tensor = ((pairs[0] + pairs[1]) + (pairs[0] - pairs[1]).T) / math.sqrt(2)
    return k


def balance(
    inputs: Float64[Tensor, "n q"],
    weights: Float64[Tensor, "m q"],
    input_errors: Float64[Tensor, "n q"],
    weight_errors: Float64[Tensor, "m q"],
) -> Float64[Tensor, " q"]:
    """Exponents u of D = diag(2^u), constant on groups of 4, of sum zero, none beyond 1/8.

    A group has the cross risks a = tr(W^T W E_x^T E_x) of rounded inputs and
    b = tr(X^T X E_w^T E_w) of rounded weights, means over rows of its own 4 x 4 moments. Errors
    follow the largest element of the block of 32 and hardly change with u, so the risks become
    a 4^-u + b 4^u: the least at u = log2(a / b) / 4. Zero where a group lacks one of the risks.
    """

    def moments(rows: Tensor) -> Tensor:
        groups = rows.unflatten(-1, (-1, GROUP)).transpose(0, 1)
        moment: Tensor = groups.mT @ groups / len(rows)
        return moment

    of_inputs = (moments(weights) * moments(input_errors)).sum((-2, -1))
    of_weights = (moments(inputs) * moments(weight_errors)).sum((-2, -1))
    if not bool(((of_inputs > 0) & (of_weights > 0)).all()):
        return torch.zeros_like(inputs[0])
    exponents = capped((of_inputs / of_weights).log2() / 4, RADIUS)
    return exponents.repeat_interleave(GROUP)


def _fold_moments(left: Tensor, right: Tensor) -> Tensor:
    """E(left_i right_j) over even rows and over odd rows, [2, q, q]."""
    folds = [(left[first::2], right[first::2]) for first in (0, 1)]
    return torch.stack([of_left.T @ of_right / len(of_left) for of_left, of_right in folds])
