"""What the rounding of inputs does to outputs in the mean, put back into the weights beforehand.

A weight meets rounded inputs x^, not x. Let x^ = x G + n with G = H^-1 C the regression of x^ on x:
H = E[x^T x], C = E[x^T x^], R = E[x^^T x^], and n what x says nothing of. Weights M W^T in place of
W^T give the error x W^T - x^ M W^T = x (I - G M) W^T - n M W^T. Its first part is a fixed linear
map of the signal. Such parts of many layers add up in amplitude, where the noise n of different
layers adds up in power: with k + 1 of them that pull in one direction the first part counts 1 + k
times. The minimiser of that sum is, for every W,

    M = (R + k C^T H^-1 C)^-1 (1 + k) C^T,

at k = 0 the least squares fit to the outputs (asymmetric calibration, as in GPTAQ, arXiv
2504.02692, and Qronos, arXiv 2505.11695, here for the rounding of inputs alone), which shrinks
whatever is noisy; for k -> infinity the least noise among all M that shrink nothing, G M = I.
The factor k is `coherence`. A ridge pulls M towards I where calibration says little.

What it is for: floor cuts the largest values of a block, and every rounding to nearest shrinks.
Nothing is added at run time.

Within blocks of `CORRECTION_BLOCK` channels. What rounding does to a block of 32 is a matter of
these 32, and what other channels say about it they say by their correlation. Blocks of 256 leave
what one M for the whole width leaves, to the measurement's precision, from two moments of 256
numbers a channel in place of two more matrices of the Hessian's size, and from solves that cost
d 256^2 in place of d^3.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from mxtorq.errors import FormatError

CORRECTION_BLOCK = 256
"""Channels of a block; the last one has what is left."""

_SOLID = 1e-4
"""Of the block's mean diagonal, added to H before it is inverted: directions that no token had pull
on nothing, and what float32 sums leave of a zero eigenvalue is far below."""


def correction(
    plain: Float64[Tensor, "n n"],
    rounded: Float64[Tensor, "n n"],
    cross: Float64[Tensor, "n n"],
    *,
    ridge: float,
    coherence: float,
) -> Float64[Tensor, "n n"]:
    """M^T of one block: weights W' become W' M^T there.

    Args:
        plain: H, the second moment of the transformed inputs.
        rounded: R, that of the same inputs after their rounding.
        cross: C, E[x^T x^]; rows belong to the plain inputs.
        ridge: how much is paid for M - I, as a part of the mean diagonal of H.
        coherence: k, see above.

    Raises:
        FormatError: the moments are not those of any inputs.
    """
    level = plain.diagonal().mean()
    eye = torch.eye(len(plain), dtype=plain.dtype, device=plain.device)
    if not level > 0:  # nothing was ever seen here
        return eye
    explained = torch.linalg.solve_triangular(
        _factor(plain + _SOLID * level * eye), cross, upper=False
    )
    system = rounded + coherence * (explained.T @ explained)
    system += ridge * level * (1.0 + coherence) * eye
    target = (1.0 + coherence) * (cross.T + ridge * level * eye)
    fitted: Tensor = torch.cholesky_solve(target, _factor(system))
    return fitted.T


def correct_(
    weight: Float32[Tensor, "d_out d"], matrices: Sequence[Float64[Tensor, "_ _"]]
) -> None:
    """Replace W' by W' M^T, block by block of its columns and in float64."""
    for columns, matrix in zip(weight.split(CORRECTION_BLOCK, 1), matrices, strict=True):
        columns.copy_(columns.double() @ matrix)


def _factor(matrix: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    if bool(info):
        raise FormatError(
            asked=f"to correct weights for rounded inputs of {len(matrix)} channels",
            found="moments without a Cholesky factor",
            why="second moments have no negative eigenvalues, and these have some that the ridge "
            "does not lift above zero",
            todo="pass a larger ridge, such as ridge=0.1; if that fails, look at how the moments "
            "were made (symmetric? in float64?), or choose inputs=rounded",
        )
    return lower
