"""DuQuant's greedy search for a rotation, one outlier at a time (arXiv 2406.01721).

A base matrix R0 spreads its first channel evenly: row 0 has entries of magnitude 1/sqrt(n) only.
With a random rotation of the other columns, Rot = R0 diag(1, Q'), and with the exchange of channel
0 and the one that holds the outlier (the switch matrix E, R = E Rot E), a step spreads the largest
entry of all rows. Steps follow one another; after each, peak = max - min of the rotated data is
noted, and of all prefixes R_1 ... R_m the one of smallest peak is the result (m = 0: identity).

Faithful to the released code: the base, one draw of Q' a search, the pooled rows, max - min, the
best prefix. ``row`` swaps the channel numbered by the outlier's *row* modulo n, as that code does;
``column`` swaps the channel that holds the outlier, as the paper says. Decided here: entries within
the rounding error of an extreme tie with it and the first row counts, since equal tokens give equal
rows and a BLAS need not round them alike; a longer prefix must be better by more than that.

Fast because a rotation keeps a row's norm and an entry cannot exceed it: rows are visited in the
order of their norms, and the visit ends where norms fall below both max and -min found so far. What
ends it is a bound, not a guess, so nothing is missed. With outliers or heavy tails a small part of
the rows is visited; of Gaussian rows, whose norms are alike, most are.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

FIRST_CHUNK, LARGEST_CHUNK = 256, 4096
"""Rows that are rotated together: few at first, then as many as fit a core's caches."""


class Index(StrEnum):
    """Which number of the outlier's place chooses the channel that is spread."""

    ROW = "row"
    COLUMN = "column"


@dataclass(frozen=True, eq=False)
class GreedyFit:
    """The rotation of the best prefix."""

    rotation: Float64[Tensor, "n n"]
    channels: tuple[int, ...]
    """The channel that each of the prefix's steps exchanged with channel 0."""
    peaks: tuple[float, ...]
    """max - min before each step and after the last, whether or not the prefix contains it."""


def exchange(matrix: Float64[Tensor, "n n"], channel: int) -> Float64[Tensor, "n n"]:
    """E M E: rows and columns 0 and ``channel`` change places."""
    order = list(range(len(matrix)))
    order[0], order[channel] = channel, 0
    return matrix[order][:, order]


def uniform_base(size: int) -> Float64[Tensor, "n n"]:
    """R0, orthogonal, with entries of magnitude 1/sqrt(n) in row 0.

    The product of Givens rotations that DuQuant defines is Helmert's matrix, written down here:
    row i is 1 / sqrt((i+1)(i+2)) up to column i, then -sqrt((i+1)/(i+2)); the last row is uniform
    and is exchanged with the first.
    """
    base = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size - 1):
        base[i, : i + 1] = 1 / math.sqrt((i + 1) * (i + 2))
        base[i, i + 1] = -math.sqrt((i + 1) / (i + 2))
    base[-1] = 1 / math.sqrt(size)
    return exchange(base, size - 1)


def random_base(size: int, draw: torch.Generator) -> Float64[Tensor, "n n"]:
    """Rot = R0 diag(1, Q'), Q' uniform over the rotations and reflections of n - 1 channels."""
    gaussian = torch.randn(size - 1, size - 1, dtype=torch.float64, generator=draw)
    q, r = torch.linalg.qr(gaussian)
    mixed = torch.eye(size, dtype=torch.float64)
    # QR is unique once R's diagonal is positive: no library's choice of signs enters.
    mixed[1:, 1:] = q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
    return uniform_base(size) @ mixed


def tie_width(largest_norm: float, size: int, steps: int) -> float:
    """Differences up to this may be rounding: a bound on what ``steps`` products of n x n matrices
    in float64 add to an entry of a row of that norm (n^2 eps a product, with room for both sides of
    a comparison and for the matrices' own deviation from orthogonality)."""
    return 4 * (steps + 1) * size**2 * torch.finfo(torch.float64).eps * largest_norm


def greedy_rotation(
    rows: Float[Tensor, "rows n"], base: Float64[Tensor, "n n"], *, steps: int, index: Index
) -> GreedyFit:
    """The best prefix of ``steps`` greedy steps on pooled rows; the result is on the CPU.

    Args:
        rows: one block of activations a row, in the order that ``row`` counts; float64 inside.
        base: Rot of `random_base`.
        steps: steps of the search; the prefix has at most as many.
        index: what chooses the channel.
    """
    size = len(base)
    search = _RowsByNorm(rows.double(), steps)
    product = best = torch.eye(size, dtype=torch.float64)
    channels: list[int] = []
    peaks: list[float] = []
    lowest, length = math.inf, 0
    for step in range(steps + 1):
        high, low = search.extremes(product)
        peaks.append(high - low)
        if peaks[-1] < lowest - 2 * search.tie:
            lowest, best, length = peaks[-1], product, step
        if step < steps:
            row, column = search.first_outlier()
            channels.append(row % size if index is Index.ROW else column)
            product = product @ exchange(base, channels[-1])
    return GreedyFit(_orthonormal(best), tuple(channels[:length]), tuple(peaks))


class _RowsByNorm:
    """Rows in chunks of descending norm, and the largest and smallest entry after a rotation."""

    def __init__(self, rows: Float64[Tensor, "rows n"], steps: int) -> None:
        norms, order = rows.norm(dim=1).sort(descending=True, stable=True)
        lengths = _chunk_lengths(len(rows))
        self._chunks: tuple[Tensor, ...] = rows[order].split(lengths)
        self._places: tuple[Tensor, ...] = order.split(lengths)
        self._norms = [float(part[0]) for part in norms.split(lengths)]
        self.tie = tie_width(self._norms[0], rows.shape[1], steps)

    def extremes(self, rotation: Float64[Tensor, "n n"]) -> tuple[float, float]:
        """The largest and the smallest entry of all rows times ``rotation``."""
        self._rotation = rotation.to(self._chunks[0].device)
        self._visited: list[tuple[float, float]] = []
        self._high, self._low = -math.inf, math.inf
        for chunk, norm in zip(self._chunks, self._norms, strict=True):
            # No entry of this or a later chunk exceeds the norm, in either direction.
            if norm < min(self._high, -self._low) - 2 * self.tie:
                break
            low, high = (float(value) for value in torch.aminmax(chunk @ self._rotation))
            self._visited.append((high, low))
            self._high, self._low = max(self._high, high), min(self._low, low)
        return self._high, self._low

    def first_outlier(self) -> tuple[int, int]:
        """Row and column of the first entry that ties with the extreme of larger magnitude.

        The smallest entry counts when magnitudes tie, as in the released code.
        """
        sign = 1 if self._high > -self._low + self.tie else -1
        bound = self._high if sign > 0 else -self._low
        found = []
        for at, (high, low) in enumerate(self._visited):
            if (high if sign > 0 else -low) >= bound - self.tie:
                found.append(self._first(at, sign, bound - self.tie))
        return min(found)

    def _first(self, at: int, sign: int, bound: float) -> tuple[int, int]:
        """The first row of chunk ``at``, by its place in the input, with an entry at the bound."""
        ties = sign * (self._chunks[at] @ self._rotation) >= bound
        hit: Int64[Tensor, " hits"] = ties.any(1).nonzero().squeeze(1)
        first = hit[self._places[at][hit].argmin()]
        return int(self._places[at][first]), int(ties[first].int().argmax())


def _chunk_lengths(total: int) -> list[int]:
    lengths: list[int] = []
    step = FIRST_CHUNK
    while total:
        lengths.append(min(step, total))
        total -= lengths[-1]
        step = min(2 * step, LARGEST_CHUNK)
    return lengths


def _orthonormal(rotation: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """Clear the rounding that many products gather: one Newton step to the polar factor."""
    return 1.5 * rotation - 0.5 * rotation @ rotation.T @ rotation
