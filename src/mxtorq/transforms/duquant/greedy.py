"""DuQuant's greedy search for a rotation, one outlier at a time (arXiv 2406.01721).

A base matrix R0 spreads its first channel evenly: row 0 has entries of magnitude 1/sqrt(n) only.
With a random rotation of the other columns, Rot = R0 diag(1, Q'), and with the exchange of channel
0 and the one that holds the outlier (the switch matrix E, R = E Rot E), a step spreads the largest
entry of all rows. Steps follow one another; after each, peak = max - min of the rotated data is
noted, and of all prefixes R_1 ... R_m the one of smallest peak is the result (m = 0: identity).

Faithful to the released code: the base, one draw of Q' a search, the pooled rows, max - min, the
best prefix. ``row`` swaps the channel numbered by the outlier's *row* modulo n, as that code does;
``column`` swaps the channel that holds the outlier, as the paper says. Decided here: entries within
the rounding error of an extreme tie with it and the first row counts, so that it does not matter
how rows were brought about; a longer prefix must be better by more than that. An entry is the sum
of its products from channel 0 up in float64, whatever chunks and threads it was found by.

Fast because a rotation keeps a row's norm and an entry cannot exceed it: rows are visited in the
order of their norms, and the visit ends where norms fall below both max and -min found so far. What
ends it is a bound, not a guess, so nothing is missed. With outliers or heavy tails a small part of
the rows is visited; of Gaussian rows, whose norms are alike, most are. Whole chunks are multiplied
in float32, by the BLAS, and only entries that its rounding leaves in question are summed.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
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
    rows: Float[Tensor, "rows n"],
    base: Float64[Tensor, "n n"],
    *,
    steps: int,
    index: Index,
) -> GreedyFit:
    """The best prefix of ``steps`` greedy steps on pooled rows; the result is on the CPU.

    Args:
        rows: one block of activations a row, in the order that ``row`` counts; float64 inside.
        base: Rot of `random_base`.
        steps: steps of the search; the prefix has at most as many.
        index: what chooses the channel.
    """
    size = len(base)
    search = _RowsByNorm(rows, steps)
    product = best = torch.eye(size, dtype=torch.float64)
    exchanged: dict[int, Tensor] = {}
    channels: list[int] = []
    peaks: list[float] = []
    lowest, length = math.inf, 0
    for step in range(steps + 1):
        seen = search.look(product)
        peaks.append(seen.high - seen.low)
        if peaks[-1] < lowest - 2 * search.tie:
            lowest, best, length = peaks[-1], product, step
        if step < steps:
            channel = seen.row % size if index is Index.ROW else seen.column
            if channel not in exchanged:
                exchanged[channel] = exchange(base, channel)
            channels.append(channel)
            product = product @ exchanged[channel]
    return GreedyFit(_orthonormal(best), tuple(channels[:length]), tuple(peaks))


class _Look(NamedTuple):
    """What a step of the search sees of the rotated rows."""

    high: float
    """The largest entry."""
    low: float
    """The smallest entry."""
    row: int
    """The first row with an entry that ties with the extreme of larger magnitude; the smallest
    entry counts when magnitudes tie, as in the released code."""
    column: int
    """The first column of that row with such an entry."""


class _RowsByNorm:
    """Rows in chunks of falling norm, brought together when a chunk is first visited."""

    def __init__(self, rows: Float[Tensor, "rows n"], steps: int) -> None:
        self._rows = rows
        norms = torch.cat([part.double().norm(dim=1) for part in rows.split(1024)])
        norms, order = norms.sort(descending=True, stable=True)
        lengths = _chunk_lengths(len(rows))
        self._places = order.split(lengths)
        self._norms = [float(part[0]) for part in norms.split(lengths)]
        self.tie = tie_width(self._norms[0], rows.shape[1], steps)
        self._unit = self._norms[0] or 1.0
        # In units of the largest norm: an inner product of n terms, and its factors rounded to
        # float32, are off by less than n + 3 eps; twice for two sides, once for room.
        self._slack = 3 * (rows.shape[1] + 3) * torch.finfo(torch.float32).eps
        self._slack += self.tie / self._unit
        self._screen = _screening_dtype(rows.shape[1], rows.device)
        self._chunks: list[tuple[Float[Tensor, "m n"], Int64[Tensor, " m"]]] = []

    def look(self, rotation: Float64[Tensor, "n n"]) -> _Look:
        """The extremes of all rows times ``rotation``."""
        screen = rotation.to(self._rows.device, self._screen)
        high, low = -math.inf, math.inf
        visited: list[tuple[float, float]] = []
        for at, norm in enumerate(self._norms):
            # No entry of this or a later chunk exceeds the norm, in either direction.
            if norm / self._unit < min(high, -low) - self._slack:
                break
            if at == len(self._chunks):
                self._chunks.append(self._gathered(at))
            smallest, largest = (float(x) for x in torch.aminmax(self._chunks[at][0] @ screen))
            visited.append((largest, smallest))
            high, low = max(high, largest), min(low, smallest)
        over, under = high - self._slack, low + self._slack
        summed = [
            self._summed(at, rotation, over, under)
            for at, (largest, smallest) in enumerate(visited)
            if largest >= over or smallest <= under
        ]
        values, entries = (np.concatenate(parts) for parts in zip(*summed, strict=True))
        high, low = float(values.max()), float(values.min())
        ties = values >= high - self.tie if high > -low + self.tie else values <= low + self.tie
        return _Look(high, low, *divmod(int(entries[ties].min()), len(rotation)))

    def _gathered(self, at: int) -> tuple[Tensor, Tensor]:
        """The rows of chunk ``at`` in units of the largest norm, and their places in the input; of
        equal neighbours only the first, since equal tokens can be many."""
        rows = self._rows[self._places[at]].double()
        fresh = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        fresh[1:] = (rows[1:] != rows[:-1]).any(1)
        return (rows[fresh] / self._unit).to(self._screen), self._places[at][fresh]

    def _summed(
        self, at: int, rotation: Float64[Tensor, "n n"], over: float, under: float
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Values of the entries of chunk ``at`` that may be extremes, and their numbers, counted
        row by row in the input."""
        rows, places = self._chunks[at]
        product = rows @ rotation.to(rows)
        which, columns = ((product >= over) | (product <= under)).nonzero().unbind(1)
        left = self._rows[places[which]].double().cpu().numpy()
        values = sums_of_products(left, rotation.numpy().T[columns.cpu().numpy()])
        return values, (places[which] * len(rotation) + columns).cpu().numpy()


def _screening_dtype(size: int, device: torch.device) -> torch.dtype:
    """float32, unless its products are coarser than it: torch can be told to take TF32 or bfloat16
    for them, and then a product with the identity is no copy."""
    probe = torch.full((LARGEST_CHUNK, size), 1 + torch.finfo(torch.float32).eps, device=device)
    same = torch.equal(probe @ torch.eye(size, device=device), probe)
    return torch.float32 if same else torch.float64


def sums_of_products(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inner product of each row with its partner, summed from the first channel to the last:
    what an entry is, to the bit."""
    return np.asarray(np.cumsum(left * right, axis=1)[:, -1])


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
