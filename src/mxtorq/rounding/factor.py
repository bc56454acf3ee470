"""The triangle behind GPTQ: how the error of a column pulls on all later ones.

With the damped Hessian H = R R^T, R upper triangular in the order of rounding, the goal of a row's
errors e = w - q is

    e H e^T = sum_k (e R)_k^2 = sum_k R_kk^2 (e_k + sum_{i<k} e_i R_ik / R_kk)^2

so column k is best rounded at w_k + sum_{i<k} e_i R_ik / R_kk, which makes the k-th square that of
its own rounding error. These are the weights that GPTQ (arXiv 2210.17323) arrives at through the
inverse of H; that both are one is how WUSH (arXiv 2512.00956) reads it. Here no d x d inverse is
formed, which was the larger half of the work. Only inside of a group of 32 columns are weights
moved as in the paper, by U = R^-1, since a group's scale needs all of its weights moved at once.
A diagonal block of U is the inverse of that block of R.

A channel that calibration never saw (H_jj = 0) is given the diagonal 1: it pulls on nothing. The
factor is in float64, what moves weights in float32.

At a width of 14336 a matrix in float64 takes 1.6 GB, so `factorize_` works in the memory of H.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from mxtorq.errors import FormatError
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.congruence import congruence_

_ROWS = 256  # rows that are turned to float32 at once


class Factor(NamedTuple):
    """Everything in the order of rounding."""

    order: Int64[Tensor, " d"]
    """The column of the weight that is rounded first, second, ..."""
    pull: Float32[Tensor, "d d"]
    """R_ik / R_kk in row k and column i <= k; zeros above the diagonal of ones."""
    follow: Float32[Tensor, "groups 32 32"]
    """U_jk / U_jj of each group of 32, in row j and column k >= j."""
    pivots: Float64[Tensor, " d"]
    """R_kk."""
    diagonal: Float64[Tensor, " d"]
    """Of the damped Hessian."""
    added: Float64[Tensor, " d"]
    """What damping added to it."""
    complete: bool
    """Whether it is of all of H: a channel that was never seen has no other moments either."""

    def columns(self, matrix: Float32[Tensor, "rows d"]) -> Float32[Tensor, "d rows"]:
        """A matrix like the weight, one column a row."""
        columns = matrix.T.contiguous()
        forward = torch.arange(len(columns), device=columns.device)
        return columns if torch.equal(self.order, forward) else columns[self.order]


def factorize(moment: Float64[Tensor, "d d"], order: Int64[Tensor, " d"], damping: float) -> Factor:
    """The factor of a Hessian whose mean diagonal, times ``damping``, is added to its diagonal.

    Raises:
        FormatError: the damped Hessian is not positive definite.
    """
    return factorize_(moment.clone(), order, damping)


def factorize_(
    moment: Float64[Tensor, "d d"], order: Int64[Tensor, " d"], damping: float
) -> Factor:
    """As `factorize`, in the memory of the Hessian, which means nothing afterwards.

    Raises:
        FormatError: the damped Hessian is not positive definite.
    """
    seen = moment.diagonal()[order]
    damped = seen.masked_fill(seen == 0, 1.0) + damping * moment.diagonal().mean()
    lower, complete = _cholesky_(moment, order.flip(0), damped.flip(0), damping)
    # Read backwards H is L L^T; read forwards again, L is the upper triangle R.
    pivots, width = lower.diagonal().clone(), len(lower)
    pull = torch.empty(width, width, dtype=torch.float32, device=lower.device)
    for start in range(0, width, _ROWS):
        stop = min(start + _ROWS, width)
        rows = lower.T[start:stop] / pivots[start:stop, None]
        pull[width - stop : width - start] = rows.flip(0, 1)
    return Factor(
        order=order,
        pull=pull,
        follow=_follow(lower, pivots),
        pivots=pivots.flip(0),
        diagonal=damped,
        added=damped - seen,
        complete=complete,
    )


def _follow(
    lower: Float64[Tensor, "d d"], pivots: Float64[Tensor, " d"]
) -> Float32[Tensor, "groups 32 32"]:
    """The inverse of each diagonal block of L, forwards again, over its diagonal."""
    blocks = torch.stack(
        [lower[at : at + BLOCK, at : at + BLOCK] for at in range(0, len(lower), BLOCK)]
    )
    identity = torch.eye(BLOCK, dtype=torch.float64, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(blocks, identity, upper=False)
    return (inverse * pivots.view(-1, BLOCK, 1)).float().flip(0, 1, 2).contiguous()


def _cholesky_(
    moment: Float64[Tensor, "d d"],
    order: Int64[Tensor, " d"],
    diagonal: Float64[Tensor, " d"],
    damping: float,
) -> tuple[Float64[Tensor, "d d"], bool]:
    """The lower factor of the Hessian in ``order`` with another diagonal, in the Hessian's memory.

    H_jj = 0 is seen by none; with the factor comes whether that left nothing out.

    Raises:
        FormatError: there is none.
    """
    width = len(order)
    backwards = torch.equal(order, torch.arange(width - 1, -1, -1, device=order.device))
    # A flip is several times faster than an index.
    congruence_(moment, lambda rows: rows.flip(1) if backwards else rows[:, order])
    ordered = moment.T  # column by column, as LAPACK has it: so that it works in place
    unseen, complete = ordered.diagonal() == 0, True
    if bool(unseen.any()):
        complete = not bool(ordered[unseen].any())
        ordered[unseen] = 0.0
        ordered[:, unseen] = 0.0
    ordered.diagonal().copy_(diagonal)
    info = torch.empty((), dtype=torch.int32, device=moment.device)
    lower: Tensor = torch.linalg.cholesky_ex(ordered, out=(ordered, info)).L
    if info:
        raise FormatError(
            asked=f"GPTQ with a Hessian {tuple(moment.shape)} and damping={damping}",
            found="no Cholesky factor of the damped Hessian",
            why="a second moment has no negative eigenvalues, and this matrix has some that the "
            "damping does not lift above zero",
            todo=f"pass a larger damping, such as {10 * damping:g}; if that fails, look at how the "
            "Hessian was made (symmetric? in float64?), or round with rtn",
        )
    return lower, complete
