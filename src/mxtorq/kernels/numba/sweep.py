"""The sweep over critical angles in numba, and the counts that it starts from.

What is swept, and why that finds the best angle, stands in `transforms.torq.intra_block`. Angles
come from NumPy there, since compiled arc cosines may round differently; what is left is sorting,
sums of two angles, and counts, which are integers. So the bits are the same in any order of work.

Events are sorted in linear time: dealt to as many buckets as there are events, about, and then an
insertion sort of each bucket, or a Shell sort where many fell into one.
"""

import numpy as np
from jaxtyping import Float64, Int64

from mxtorq.formats.spec import E2M1_MAGNITUDES
from mxtorq.kernels.numba.compile import kernel

_BINS = len(E2M1_MAGNITUDES)
_HALF_TURN, _QUARTER_TURN = np.pi, np.pi / 2
_GAPS = (3548, 1577, 701, 301, 132, 57, 23, 10, 4, 1)  # of a Shell sort
_MANY = 16
"""Events in a bucket from which a Shell sort pays."""


def counts(
    magnitudes: Float64[np.ndarray, "n columns"], cuts: Float64[np.ndarray, "7"]
) -> Int64[np.ndarray, "columns 8"]:
    """How many of each column's magnitudes lie above no cut, one, ..., all seven."""
    found = np.zeros((magnitudes.shape[1], _BINS), dtype=np.int64)
    _counts(magnitudes, cuts, found)
    return found


class Events:
    """The critical angles in [0, pi/2) of one pair of columns, in order.

    Args:
        alpha: arccos(cut / r) of the samples that reach a cut, cut after cut.
        phi: their polar angles in [0, pi].
        lengths: how many samples reach each of the 7 cuts.
    """

    def __init__(
        self,
        alpha: Float64[np.ndarray, " m"],
        phi: Float64[np.ndarray, " m"],
        lengths: Int64[np.ndarray, "7"],
    ) -> None:
        buckets = 2 * len(alpha) + 1
        self._theta, self._moves = _events(alpha, phi, lengths, buckets)

    def first_middle(self, narrowest: float) -> float:
        """The middle of the first interval between events that is wider than ``narrowest``."""
        return float(_first_middle(self._theta, narrowest))

    def best(self, start: Int64[np.ndarray, "16"], narrowest: float) -> tuple[float, int]:
        """The middle of the first of the best intervals, and its sum of squared counts.

        Args:
            start: counts of both columns in the first wide interval.
            narrowest: intervals up to this (radians) are not entered.
        """
        middle, squares = _best(self._theta, self._moves, start.copy(), narrowest)
        return float(middle), int(squares)


@kernel
def _counts(magnitudes, cuts, found):  # type: ignore[no-untyped-def]
    for row in range(magnitudes.shape[0]):
        for column in range(magnitudes.shape[1]):
            value, code = magnitudes[row, column], 0
            for cut in cuts:
                code += not value <= cut  # a NaN lies above everything, as for searchsorted
            found[column, code] += 1


@kernel
def _insert(theta, moves, start, stop, gap):  # type: ignore[no-untyped-def]
    for at in range(start + gap, stop):
        angle, kind, hole = theta[at], moves[at], at
        while hole >= start + gap and theta[hole - gap] > angle:
            theta[hole], moves[hole] = theta[hole - gap], moves[hole - gap]
            hole -= gap
        theta[hole], moves[hole] = angle, kind


@kernel
def _sorted(angles, kinds, buckets):  # type: ignore[no-untyped-def]
    scale = (buckets - 1) / _QUARTER_TURN
    places = np.zeros(buckets + 1, dtype=np.int64)
    for angle in angles:
        places[int(angle * scale) + 1] += 1
    for bucket in range(buckets):
        places[bucket + 1] += places[bucket]
    theta, moves = np.empty_like(angles), np.empty_like(kinds)
    for event in range(len(angles)):
        bucket = int(angles[event] * scale)
        theta[places[bucket]], moves[places[bucket]] = angles[event], kinds[event]
        places[bucket] += 1
    start = 0
    for bucket in range(buckets):  # a bucket's place is by now where it ends
        stop = places[bucket]
        if stop - start > _MANY:
            for gap in _GAPS:
                _insert(theta, moves, start, stop, gap)
        elif stop - start > 1:
            _insert(theta, moves, start, stop, 1)
        start = stop
    return theta, moves


@kernel
def _events(alpha, phi, lengths, buckets):  # type: ignore[no-untyped-def]
    angles, kinds = np.empty(4 * len(alpha) + 1), np.empty(4 * len(alpha) + 1, dtype=np.uint8)
    total = sample = 0
    for below in range(len(lengths)):
        falls, rises = 16 * (below + 1) + below, 16 * below + below + 1  # leaves, enters
        for _ in range(lengths[below]):
            a, offset = alpha[sample], phi[sample]
            sample += 1
            for angle, kind in (
                (a - offset, falls),  # |cos| falls through the cut
                (-a - offset, rises),
                (_QUARTER_TURN - a - offset, rises + 17 * _BINS),  # |sin| rises through it
                (_QUARTER_TURN + a - offset, falls + 17 * _BINS),
            ):
                turned = angle + _HALF_TURN * (angle < 0)
                angles[total], kinds[total] = turned, kind
                total += 0 <= turned < _QUARTER_TURN  # else the next one overwrites it
    return _sorted(angles[:total], kinds[:total], buckets)


@kernel
def _first_middle(theta, narrowest):  # type: ignore[no-untyped-def]
    low = 0.0
    for event in range(len(theta)):
        if theta[event] - low > narrowest:
            return (low + theta[event]) / 2
        low = theta[event]
    return (low + _QUARTER_TURN) / 2


@kernel
def _best(theta, moves, count, narrowest):  # type: ignore[no-untyped-def]
    squares = 0
    for bin in range(len(count)):
        squares += count[bin] * count[bin]
    best, middle, low, inside = squares, 0.0, 0.0, False
    for event in range(len(theta) + 1):
        high = theta[event] if event < len(theta) else _QUARTER_TURN
        if high - low > narrowest and (squares < best or not inside):
            best, middle, inside = squares, (low + high) / 2, True
        if event < len(theta):
            if inside:  # `count` holds from the first wide interval on
                leaves, enters = moves[event] >> 4, moves[event] & 15
                squares += 1 - 2 * count[leaves]
                count[leaves] -= 1
                squares += 1 + 2 * count[enters]
                count[enters] += 1
            low = high
    return middle, best
