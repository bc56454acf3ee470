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

What it is for: floor cuts the largest values of a block, and every rounding to nearest shrinks. The
price is one more moment a site in memory, C, beside H and R, and a solve of the size of a Cholesky
factor. Nothing is added at run time.
"""

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from mxtorq.errors import FormatError

_SOLID = 1e-4
"""Of the mean diagonal, added to H before it is inverted: directions that no token had pull on
nothing, and what float32 sums leave of a zero eigenvalue is far below."""
_ROWS = 512  # of a weight that are corrected at once


def correction(
    plain: Float64[Tensor, "d d"],
    rounded: Float64[Tensor, "d d"],
    cross: Float64[Tensor, "d d"],
    *,
    ridge: float,
    coherence: float,
) -> Float64[Tensor, "d d"]:
    """M^T: weights W' become W' M^T.

    Args:
        plain: H, the second moment of the transformed inputs.
        rounded: R, that of the same inputs after their rounding.
        cross: C, E[x^T x^]; rows belong to the plain inputs.
        ridge: how much is paid for M - I, as a part of the mean diagonal of H.
        coherence: k, see above.

    Raises:
        FormatError: the moments are not those of any inputs.
    """
    width, level = len(plain), plain.diagonal().mean()
    if not level > 0:  # nothing was ever seen here
        return torch.eye(width, dtype=plain.dtype, device=plain.device)
    system = rounded.clone()
    if coherence > 0:
        _add_explained_(system, plain, cross, coherence)
    system.diagonal().add_(ridge * level * (1.0 + coherence))
    target = cross.T.contiguous()
    target.diagonal().add_(ridge * level)
    target *= 1.0 + coherence
    fitted: Tensor = torch.cholesky_solve(target, _factor(system))
    del system, target  # at a width of 14336 each is 1.6 GB
    return fitted.T.contiguous()


def correct_(weight: Float32[Tensor, "d_out d"], matrix: Float64[Tensor, "d d"]) -> None:
    """Replace W' by W' M^T, in float64 and some rows at a time."""
    for rows in weight.split(_ROWS):
        rows.copy_(rows.double() @ matrix)


def _add_explained_(
    system: Float64[Tensor, "d d"],
    plain: Float64[Tensor, "d d"],
    cross: Float64[Tensor, "d d"],
    coherence: float,
) -> None:
    """Add k C^T H^-1 C; what that takes of memory ends with it."""
    solid = plain.clone()
    solid.diagonal().add_(_SOLID * plain.diagonal().mean())
    explained = torch.linalg.solve_triangular(_factor(solid), cross, upper=False)
    system.addmm_(explained.T, explained, alpha=coherence)


def _factor(matrix: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
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
