"""Whether descent lowered a row's goal: known without float64 products where the answer is clear.

What a step of column j adds to the goal is H_jj (2 slope_j step + step^2), and `descent` takes only
steps of which float32 says that this is negative. Their sum is the fall that it claims. It is off
where slopes are. A slope is a sum over k of (H_jk / H_jj) times an error or a step of column k, and
a number that goes through n roundings on its way into a sum is off by at most g = n u / (1 - n u)
of itself, u = 2^-24 (Higham, Accuracy and Stability, section 3.1). With

    h_j^2 = sum_k H_jk^2 / (H_jj H_kk)        size = |sqrt(H_kk) e_k| + sum over sweeps, its steps

a slope is off by at most g h_j size / sqrt(H_jj) (Cauchy-Schwarz), so the fall by at most

    2 g size sum over steps of sqrt(H_jj) h_j |step|

and what float32 loses below its range. h_j is the norm of a row of the correlations, far below the
sqrt(d) that would hold for any H; that is what makes the bound decide. Rows that it leaves open are
for float64.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from mxtorq.formats.spec import BLOCK
from mxtorq.rounding.goal import LEAST, unit
from mxtorq.rounding.half import Half
from mxtorq.transforms.congruence import panels


class Slopes(NamedTuple):
    """A Hessian as coordinate descent reads it."""

    pull: Float32[Tensor, "d d"]
    """H_jk / H_jj in row j and column k; zeros where H_jj is not positive."""
    diagonal: Float64[Tensor, " d"]
    """H_jj."""
    reach: Float64[Tensor, " d"]
    """sqrt(H_jj) h_j; Inf where a channel without a moment of its own has one with this."""


class Fall(NamedTuple):
    """Of each row, over the steps so far."""

    claimed: Float64[Tensor, " rows"]
    """By how much the goal has fallen."""
    travel: Float64[Tensor, " rows"]
    """The sum of reach times |step|."""
    size: Float64[Tensor, " rows"]
    """As above, the sweep that is under way left out."""
    squares: Float64[Tensor, " rows"]
    """H_jj step^2 of the sweep that is under way."""

    def add_(
        self,
        slopes: Slopes,
        here: slice,
        before: Float32[Tensor, "columns rows"],
        steps: Float32[Tensor, "columns rows"],
    ) -> None:
        """Take in the steps of some columns, with their slopes at that time."""
        step, diagonal = steps.double(), slopes.diagonal[here]
        self.claimed.sub_(diagonal @ before.double().mul_(2.0).add_(step).mul_(step))
        self.travel.add_(slopes.reach[here] @ step.abs())
        self.squares.add_(diagonal @ step.square_())

    def end_(self) -> None:
        """End a sweep."""
        self.size.add_(self.squares.sqrt())
        self.squares.zero_()

    def slack(self, slopes: Slopes, sweeps: int, block: int) -> Float64[Tensor, " rows"]:
        """How far the claim may be off, after so many sweeps in blocks of so many columns."""
        width, eps = len(slopes.diagonal), torch.finfo(torch.float64).eps
        # A product over a block, the sums of all blocks and of groups in their own, the inner step;
        # and one each for H_jk / H_jj, the error, the step and the terms of the claim.
        terms = block + (1 + sweeps) * (width // block + 1 + block // BLOCK) + BLOCK + 8
        share, seen = terms * unit(), slopes.diagonal[slopes.diagonal > 0]
        if share >= 1 or not len(seen):
            return torch.full_like(self.claimed, torch.inf)
        most, least = float(seen.max()), float(seen.min())
        share = share / (1 - share) + LEAST * math.sqrt(width * (most / least))
        lost = (1 + sweeps) * width * LEAST * math.sqrt(most)
        slack = 2 * self.travel * (share * self.size + lost)
        return slack + 4 * width * (1 + sweeps) * eps * self.claimed.abs()


def no_fall(slopes: Slopes, errors: Float32[Tensor, "d rows"]) -> Fall:
    """Before the first sweep."""
    rows = errors.shape[1]
    claimed, travel, squares = torch.zeros(3, rows, dtype=torch.float64, device=errors.device)
    for here in panels(len(errors)):
        squares.add_(slopes.diagonal[here].clamp(min=0.0) @ errors[here].double().square_())
    return Fall(claimed, travel, squares.sqrt(), torch.zeros_like(squares))


def slopes_of(moment: Half) -> Slopes:
    """From a Hessian."""
    diagonal = moment.diagonal()
    seen = diagonal.masked_fill(diagonal <= 0, torch.inf)
    pull = torch.empty(len(seen), len(seen), dtype=torch.float32, device=seen.device)
    squares = torch.zeros_like(seen)
    stray = torch.zeros_like(seen, dtype=torch.bool)
    for here, part in zip(panels(len(seen)), moment.parts, strict=True):
        after, beyond = slice(here.start, None), slice(here.stop, None)
        pull[here, after] = part / seen[here, None]
        pull[after, here] = part.T / seen[after, None]
        share = (part / seen[here, None].sqrt() / seen[after].sqrt()).square_()
        squares[here] += share.sum(1)
        squares[beyond] += share[:, len(part) :].sum(0)
        foreign = (part != 0) & (diagonal[after] <= 0)
        stray[here] |= foreign.any(1)
        stray[after] |= ((part != 0) & (diagonal[here, None] <= 0)).any(0)
    reach = (diagonal.clamp(min=0.0) * squares).sqrt().masked_fill(stray, torch.inf)
    return Slopes(pull, diagonal, reach)
