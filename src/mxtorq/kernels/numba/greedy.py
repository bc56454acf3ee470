"""One look of the greedy search at rows of falling norm, in numba.

What is searched, and what ends the visit of a row early, stands in `transforms.duquant.greedy`.
An entry of a rotated row is defined there as the sum of its products from channel 0 up, each
rounded to float64, and this is that sum: four channels at a time only in the sense that the partial
sums stay in registers. Half-way each entry is bounded by what the other half can add to it, the
product of two norms; on Gaussian rows, whose norms rule out little, this halves the work.
"""

import numpy as np
from jaxtyping import Float64

from mxtorq.kernels.numba.compile import kernel


def scan(
    rows: Float64[np.ndarray, "m n"],
    norms: Float64[np.ndarray, "m 2"],
    rotation: Float64[np.ndarray, "n n"],
    found: tuple[float, float],
    margin: float,
    extremes: Float64[np.ndarray, "m 2"],
) -> tuple[int, float, float]:
    """The rows visited, and the extremes of all entries so far.

    Args:
        rows: sorted by their norms, largest first.
        norms: of each row, and of its second half alone.
        rotation: what they are multiplied with.
        found: the largest and the smallest entry of earlier rows.
        margin: entries this far inside the extremes do not matter.
        extremes: filled with each visited row's largest and smallest entry, or with minus infinity
            and infinity where neither matters.
    """
    rest = np.linalg.norm(rotation[len(rotation) // 2 :], axis=0)
    visited, high, low = _scan(rows, norms, rotation, rest, *found, margin, extremes)
    return int(visited), float(high), float(low)


@kernel
def _add(sums, row, rotation, start, stop):  # type: ignore[no-untyped-def]
    whole = start + (stop - start) // 4 * 4
    for k in range(start, whole, 4):
        x0, x1, x2, x3 = row[k], row[k + 1], row[k + 2], row[k + 3]
        r0, r1, r2, r3 = rotation[k], rotation[k + 1], rotation[k + 2], rotation[k + 3]
        for at in range(len(sums)):
            sums[at] = (((sums[at] + x0 * r0[at]) + x1 * r1[at]) + x2 * r2[at]) + x3 * r3[at]
    for k in range(whole, stop):
        x0, r0 = row[k], rotation[k]
        for at in range(len(sums)):
            sums[at] += x0 * r0[at]


@kernel
def _scan(rows, norms, rotation, rest, high, low, margin, extremes):  # type: ignore[no-untyped-def]
    count, size = rows.shape
    sums = np.empty(size)
    for at in range(count):
        if norms[at, 0] < min(high, -low) - margin:
            return at, high, low
        for k in range(size):
            sums[k] = 0.0
        _add(sums, rows[at], rotation, 0, size // 2)
        over, under, tail, near = high - margin, low + margin, norms[at, 1], 0
        for k in range(size):
            reach = tail * rest[k]
            near |= (sums[k] + reach >= over) | (sums[k] - reach <= under)
        largest, smallest = -np.inf, np.inf
        if near:
            _add(sums, rows[at], rotation, size // 2, size)
            for k in range(size):
                largest, smallest = max(largest, sums[k]), min(smallest, sums[k])
        extremes[at, 0], extremes[at, 1] = largest, smallest
        high, low = max(high, largest), min(low, smallest)
    return count, high, low
