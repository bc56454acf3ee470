"""TORQ's Micro-Alignment Rotation: one 32 x 32 rotation that evens out the use of the codebook.

"Maximum entropy" is a squared distance (TORQ section 4.2, Eq. 5 and 21): with p_kj the fraction of
column k that rounds to magnitude j of {0, .5, 1, 1.5, 2, 3, 4, 6},

    h_k = sum_j (p_kj - 1/8)^2,     L = sum_k h_k,

and Algorithm 2 alternates an S-step (block scales for the current rotation, Eq. 6) with an R-step
(rotate some column pairs, scales frozen). A pair's loss is piecewise constant in the angle, so the
best angle is *found*, not searched for: list every angle at which a sample crosses a rounding cut,
sort them, and sweep, moving one sample between neighbouring bins an event (App. A.4). With counts
for fractions, n^2 (h + 1/8) = sum_j count_j^2 is an integer and comparisons are exact.

Rotating by another 90 degrees swaps the two columns up to sign and leaves the loss, so [0, 90)
degrees is the whole search space. Where the paper or its port leave something open we take: all
crossings, both signs, no cap on candidates; theta = 0 counted, so that a pair moves only when its
loss falls; the best rotation over all rounds returned, so that the loss never rises.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from mxtorq.formats import e8m0
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import E2M1_CUTS, E2M1_MAGNITUDES
from mxtorq.kernels.dispatch import Backend, pick

_BINS = len(E2M1_MAGNITUDES)
_HALF_TURN, _QUARTER_TURN = np.pi, np.pi / 2
NARROWEST = 1e-9
"""Intervals between events narrower than this (radians) are not entered: rounding decides there."""

# A tie goes to the even code: up at cuts 1, 3, 5, which therefore count as "at or above".
_CUTS = np.array(E2M1_CUTS)
_CUTS[1::2] = np.nextafter(_CUTS[1::2], 0.0)

Columns = NDArray[np.float64]
Crossings = list[tuple[Columns, Columns]]
"""For each cut, arccos(cut / r) and phi of the samples (r, phi) that reach it."""
Counted = Callable[[float], NDArray[np.int64]]
"""The counts of both columns after a rotation by an angle."""


@dataclass(frozen=True, eq=False)
class IntraBlockFit:
    """The rotation that was found and how the loss went."""

    rotation: Float64[Tensor, "32 32"]
    losses: tuple[float, ...]
    """L after each S-step, the first for the identity; the rotation has the smallest of them."""


def counts(magnitudes: Columns, *, backend: Backend | str = Backend.AUTO) -> NDArray[np.int64]:
    """How many of each column's scaled magnitudes [n, columns] round to each of the 8 codes."""
    if _compiled(backend):
        from mxtorq.kernels.numba import sweep

        return sweep.counts(magnitudes, _CUTS)
    bins = np.searchsorted(_CUTS, magnitudes, side="left")
    offsets = np.arange(magnitudes.shape[1]) * _BINS
    flat = np.bincount((bins + offsets).ravel(), minlength=magnitudes.shape[1] * _BINS)
    return flat.reshape(-1, _BINS)


def occupancy_loss(count: NDArray[np.int64]) -> NDArray[np.float64]:
    """h_k of each row of counts [columns, 8]."""
    fractions = count / count.sum(-1, keepdims=True)
    return np.asarray(((fractions - 1 / _BINS) ** 2).sum(-1))


def best_angle(u: Columns, v: Columns, *, backend: Backend | str = Backend.AUTO) -> float:
    """The angle in [0, pi/2) that minimises h_u' + h_v' for u' = u cos - v sin, v' = u sin + v cos.

    Exact: every interval between critical angles is evaluated. Returns 0.0 unless another angle
    is strictly better.
    """

    def counted(theta: float) -> NDArray[np.int64]:
        return counts(np.abs(_rotate(u, v, theta)), backend=backend).ravel()

    find = _compiled_sweep if _compiled(backend) else _sweep
    middle, squares = find(_crossings(u, v), counted)
    at_zero = int((counts(np.abs(np.stack((u, v), 1)), backend=backend) ** 2).sum())
    return middle if squares < at_zero else 0.0


def _sweep(crossings: Crossings, counted: Counted) -> tuple[float, int]:
    """The middle of the first of the best intervals, and its sum of squared counts."""
    theta, source, target = _events(crossings)
    edges = np.concatenate(([0.0], theta, [_QUARTER_TURN]))
    wide = np.flatnonzero(np.diff(edges) > NARROWEST)
    middles = (edges[wide] + edges[wide + 1]) / 2

    # Counts in interval m = counts at the first wide interval + all moves between the two.
    # Two columns' squared counts sum to 2 n^2 at the most, which fits 32 bits up to n = 32,767.
    start = counted(middles[0])
    integer: Any = np.int32 if start.sum() < 2**16 else np.int64
    moves = np.zeros((2 * _BINS, len(theta) + 1), dtype=np.int8)
    event = np.arange(1, len(theta) + 1)
    moves[source, event] = -1
    moves[target, event] = 1
    squares = np.zeros(len(wide), dtype=integer)
    for row, begin in zip(moves, start, strict=True):
        count = np.cumsum(row, dtype=integer)[wide]
        count += integer(begin) - count[0]
        squares += count * count
    best = int(np.argmin(squares))
    return float(middles[best]), int(squares[best])


def _compiled_sweep(crossings: Crossings, counted: Counted) -> tuple[float, int]:
    from mxtorq.kernels.numba import sweep

    alpha, phi = (np.concatenate(parts) for parts in zip(*crossings, strict=True))
    events = sweep.Events(alpha, phi, np.array([len(part) for part, _ in crossings]))
    return events.best(counted(events.first_middle(NARROWEST)), NARROWEST)


def _compiled(backend: Backend | str) -> bool:
    return pick(backend, torch.device("cpu")) is Backend.NUMBA


def _rotate(u: Columns, v: Columns, theta: float) -> Columns:
    cos, sin = np.cos(theta), np.sin(theta)
    return np.stack((u * cos - v * sin, u * sin + v * cos), axis=1)


def _crossings(u: Columns, v: Columns) -> Crossings:
    radius, phi = np.hypot(u, v), np.arctan2(v, u)
    phi[phi < 0] += _HALF_TURN
    reaching = ((cut, radius > cut) for cut in E2M1_CUTS)
    return [(np.arccos(cut / radius[reaches]), phi[reaches]) for cut, reaches in reaching]


def _events(
    crossings: Crossings,
) -> tuple[Columns, NDArray[np.int64], NDArray[np.int64]]:
    """Sorted critical angles in [0, pi/2) and, for each, the bin that a sample leaves and enters.

    With (u, v) = r (cos phi, sin phi): |u'| = r |cos(theta + phi)| and |v'| = r |sin(theta + phi)|.
    Bins are numbered 0..7 for u' and 8..15 for v'. Everything has period pi in theta and in phi.
    """
    angles, sources, targets = [], [], []
    for below, (alpha, offset) in enumerate(crossings):
        above = below + 1
        for column, crossing, leaves, enters in (
            (0, alpha - offset, above, below),  # |cos| falls through the cut
            (0, -alpha - offset, below, above),
            (1, _QUARTER_TURN - alpha - offset, below, above),  # |sin| rises through it
            (1, _QUARTER_TURN + alpha - offset, above, below),
        ):
            angle = crossing + _HALF_TURN * (crossing < 0)
            angle = angle[(angle >= 0) & (angle < _QUARTER_TURN)]
            angles.append(angle)
            sources.append(np.full(len(angle), column * _BINS + leaves))
            targets.append(np.full(len(angle), column * _BINS + enters))
    theta = np.concatenate(angles)
    order = np.argsort(theta)
    return theta[order], np.concatenate(sources)[order], np.concatenate(targets)[order]


def select_pairs(
    count: NDArray[np.int64], *, top: int, pairs: int, complementarity: float
) -> list[tuple[int, int]]:
    """Disjoint column pairs worth rotating (TORQ App. A.5, Eq. 20 to 23).

    Among the ``top`` columns of largest h, a pair scores h_k + h_l + lambda c_kl with
    c_kl = -sum_j (p_kj - 1/8)(p_lj - 1/8): bad columns that deviate in opposite ways come first.
    """
    loss = occupancy_loss(count)
    deviation = count / count.sum(-1, keepdims=True) - 1 / _BINS
    candidates = np.argsort(-loss, kind="stable")[:top]
    scored = sorted(
        (
            -(loss[k] + loss[m] - complementarity * float(deviation[k] @ deviation[m])),
            int(k),
            int(m),
        )
        for at, k in enumerate(candidates)
        for m in candidates[at + 1 :]
    )
    chosen: list[tuple[int, int]] = []
    used: set[int] = set()
    for _, k, m in scored:
        if len(chosen) < pairs and not used & {k, m}:
            chosen.append((k, m))
            used |= {k, m}
    return chosen


def maximize_entropy(
    blocks: Float[Tensor, "n width"],
    *,
    s_step: ScaleRule,
    rounds: int,
    top: int,
    pairs: int,
    complementarity: float,
    tolerance: float,
    backend: Backend | str = Backend.AUTO,
) -> IntraBlockFit:
    """TORQ's Algorithm 2 on pooled blocks that the inter-block rotation has already been through.

    Args:
        blocks: one block of activations a row; FP64 inside.
        s_step: the rule of the S-step's scales (Eq. 6 is ``floor6``).
        rounds: S/R rounds at the most.
        top: candidate columns a round (K_top).
        pairs: column pairs a round.
        complementarity: lambda of the pair score.
        tolerance: stop when a round changes L by less.
        backend: who sweeps and counts.
    """
    x = blocks.double().cpu().numpy()
    width = x.shape[1]
    rotation = best = np.eye(width)
    losses: list[float] = []
    for step in range(rounds + 1):
        z = _scaled(x @ rotation, s_step)
        count = counts(np.abs(z), backend=backend)
        loss = float(occupancy_loss(count).sum())
        if not losses or loss < min(losses):
            best = rotation
        settled = bool(losses) and abs(losses[-1] - loss) < tolerance
        losses.append(loss)
        if settled or step == rounds:
            break
        rotation = rotation.copy()
        chosen = select_pairs(count, top=top, pairs=pairs, complementarity=complementarity)
        for p, q in chosen:
            theta = best_angle(z[:, p], z[:, q], backend=backend)
            if theta:
                rotation[:, [p, q]] = _rotate(rotation[:, p], rotation[:, q], theta)
    return IntraBlockFit(torch.from_numpy(_orthonormal(best)), tuple(losses))


def _scaled(y: Columns, rule: ScaleRule) -> Columns:
    """Z of Eq. 6: each row divided by its block scale."""
    amax = torch.from_numpy(np.abs(y).max(axis=1)).float()
    scale = e8m0.decode(e8m0.encode_amax(e8m0.magnitude_bits(amax), rule))
    return np.asarray(y / scale.double().numpy()[:, None])


def _orthonormal(rotation: Columns) -> Columns:
    """Clear the rounding that a product of many rotations gathers: one Newton step to the polar
    factor."""
    return np.asarray(1.5 * rotation - 0.5 * rotation @ rotation.T @ rotation)
