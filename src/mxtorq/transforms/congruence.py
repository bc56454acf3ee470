"""C^T M C in the memory of M, where C is known by what it does to rows.

A Hessian meets a change of coordinates from both sides: T^T H T for a transform, P^T H P for an
order of columns. At a width of 14336 it takes 1.6 GB, so no second one is made: the map goes over
the rows, panel by panel, the matrix is transposed square by square, and the map goes over the rows
again. M need not be symmetric: what comes out is C^T M^T C.
"""

from collections.abc import Callable, Iterator

from jaxtyping import Float
from torch import Tensor

_PANEL = 512  # rows that are worked on together


def congruence_(matrix: Float[Tensor, "d d"], change: Callable[[Tensor], Tensor]) -> None:
    """Replace M by C^T M^T C.

    Args:
        matrix: M.
        change: gives r C for each row r of some rows of M; it may give those rows themselves.
    """
    for panel in panels(len(matrix)):
        matrix[panel] = change(matrix[panel])
    transpose_(matrix)
    for panel in panels(len(matrix)):
        matrix[panel] = change(matrix[panel])


def transpose_(matrix: Float[Tensor, "d d"]) -> None:
    """Transpose a square matrix in its own memory."""
    steps = list(panels(len(matrix)))
    for at, rows in enumerate(steps):
        for columns in steps[at:]:
            upper = matrix[rows, columns].clone()
            matrix[rows, columns] = matrix[columns, rows].T.clone()
            matrix[columns, rows] = upper.T


def panels(width: int) -> Iterator[slice]:
    """The rows of a matrix, some at a time."""
    return (slice(start, min(start + _PANEL, width)) for start in range(0, width, _PANEL))
