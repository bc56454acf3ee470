"""What GPTQ minimises, and which rows of a weight it served: nearly free where the answer is clear.

The goal of a row's errors e = w - q is e H e^T. In float64 it costs 2 d^2 operations a row, for two
candidates more than all of GPTQ. But with the factor H + D = R R^T (`factor`; D is diagonal)

    goal(e) = sum_k (e R)_k^2  -  sum_k D_k e_k^2

GPTQ has its own sum at hand when it ends, and partial sums bound the other candidate's from below,
so most rows are decided after some of its components. That is done in float32, and a row is
decided only where the bound below leaves no doubt; all others are computed by `goal` in float64. So
who wins is what exact numbers say, as far as float64 can tell.

The bound. A sum of n float32 products is off by at most g = n u / (1 - n u) of the sum of
magnitudes, u = 2^-24, in any order, fused or not (Higham, Accuracy and Stability, section 3.1). So
the norm |e R| is off by at most g | |e| |R| |, which is at most g sqrt(d) size with
size^2 = sum_i e_i^2 (H + D)_ii, because the rows of R have the norms sqrt((H + D)_ii). The factor
itself solves a neighbouring problem: |R R^T - H - D|_ij <= g' sqrt((H + D)_ii (H + D)_jj) with
g' = (d + 1) u' of float64 (section 10.1), which changes a goal by at most g' d size^2; that is
taken fourfold, which covers the sums in float64 and a Hessian that is symmetric up to rounding.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor

from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import ScaledE2M1
from mxtorq.kernels.dispatch import dequantize
from mxtorq.rounding.factor import Factor
from mxtorq.rounding.half import Half

_ROWS = 1024  # rows whose goal is computed at once
_PANEL = 512  # components of e R that are computed at once, and terms of their sums
_WORTH = 8  # a copy of the rest is worth it where one row in so many is decided
LEAST = 2.0**-126
"""What float32 may lose below its range."""


class Sums(NamedTuple):
    """Of each row, over the columns that were looked at."""

    squares: Float64[Tensor, " rows"]
    """(e R)_k^2."""
    sizes: Float64[Tensor, " rows"]
    """e_k^2 (H + D)_kk."""
    added: Float64[Tensor, " rows"]
    """D_k e_k^2."""

    def add_errors_(
        self, factor: Factor, here: slice, errors: Float32[Tensor, "columns rows"]
    ) -> None:
        """Take in the errors of some columns."""
        squares = errors.double().square_()
        self.sizes.add_(factor.diagonal[here] @ squares)
        self.added.add_(factor.added[here] @ squares)

    def add_outputs_(
        self, factor: Factor, here: slice, outputs: Float32[Tensor, "columns rows"]
    ) -> None:
        """Take in some columns of e R, each over its pivot."""
        self.squares.add_(factor.pivots[here].square() @ outputs.double().square_())


def no_sums(rows: int, device: torch.device) -> Sums:
    """Zeros."""
    return Sums(*torch.zeros(3, rows, dtype=torch.float64, device=device))


def goal(
    rounded: MXFP4 | ScaledE2M1, weight: Float32[Tensor, "d_out d"], moment: Float64[Tensor, "d d"]
) -> Float64[Tensor, " d_out"]:
    """(q - w) H (q - w)^T of each row in float64: the mean square of the outputs' errors."""
    values = dequantize(rounded)
    sums = []
    for here in (slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS)):
        error = values[here].double() - weight[here]
        sums.append(((error @ moment) * error).sum(-1))
    return torch.cat(sums)


def bounds(
    sums: Sums, factor: Factor, terms: int
) -> tuple[Float64[Tensor, " rows"], Float64[Tensor, " rows"]]:
    """Between which numbers the goals lie, from sums of at most ``terms`` float32 numbers each."""
    width, eps = len(factor.order), torch.finfo(torch.float64).eps
    share = (terms + 4) * unit()
    slack = sums.sizes.sqrt() * (math.sqrt(width) * share / (1 - share) if share < 1 else math.inf)
    slack += 2 * width * LEAST * factor.pivots.norm()  # below the range of float32
    rest = 4 * width * (width + 2) * eps * sums.sizes
    root = sums.squares.sqrt()
    below = (root - slack).clamp(min=0.0).square() - rest - sums.added
    return below, (root + slack).square() + rest - sums.added


def better_rows(
    sums: Sums,
    terms: int,
    ours: MXFP4 | ScaledE2M1,
    plain: MXFP4 | ScaledE2M1,
    weight: Float32[Tensor, "d_out d"],
    moment: Float64[Tensor, "d d"] | Half,
    factor: Factor,
) -> Bool[Tensor, " d_out"]:
    """Where our goal is strictly below that of the plain codes.

    Args:
        sums: of our errors.
        terms: that stand behind each of its float32 numbers.
        ours: what GPTQ chose.
        plain: what rounding to nearest chose.
        weight: what both stand for.
        moment: H.
        factor: of H + D.
    """
    least, most = bounds(sums, factor, terms)
    better = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    alike = [(one == other).all(1) for one, other in zip(ours, plain, strict=True)]
    unclear = ~torch.stack(alike).all(0)
    if factor.complete:  # else there are moments of a channel that was never seen, of no inputs
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            if bool(unclear[rows].any()):
                errors = factor.columns(weight[rows] - dequantize(_rows(plain, rows)))
                clear, better[rows] = _compare(least[rows], most[rows], errors, factor)
                unclear[rows] &= ~clear
    return better | _by_goal(unclear, ours, plain, weight, moment)


def _compare(
    least: Float64[Tensor, " rows"],
    most: Float64[Tensor, " rows"],
    errors: Float32[Tensor, "d rows"],
    factor: Factor,
) -> tuple[Bool[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Whether it is clear which goal is smaller, and whether it is that from ``least`` to ``most``.

    The other goal grows panel by panel of e R, and a row that is decided is left out of the next.
    The last panel comes first. It costs most, and gives more than its share: many columns before it
    pull on a column, and what rounding to nearest leaves of that GPTQ has made good.
    """
    width, rows = errors.shape
    panels = [slice(at, min(at + _PANEL, width)) for at in range(0, width, _PANEL)]
    clear, wins = torch.zeros(2, rows, dtype=torch.bool, device=errors.device)
    left = torch.arange(rows, device=errors.device)
    sums = no_sums(rows, errors.device)
    for here in panels:
        sums.add_errors_(factor, here, errors[here])
    for at, here in reversed(list(enumerate(panels))):
        outputs = factor.pull[here, here] @ errors[here]
        for before in panels[:at]:
            outputs.addmm_(factor.pull[here, before], errors[before])
        sums.add_outputs_(factor, here, outputs)
        below, above = bounds(sums, factor, _PANEL + len(panels))
        won = most[left] < below
        wins[left[won]] = True
        if at == 0:
            clear[left] = won | (least[left] > above)
        elif int(won.sum()) * _WORTH > len(left):
            clear[left[won]] = True
            stay = (~won).nonzero().flatten()
            left, errors = left[stay], errors.index_select(1, stay)
            sums = Sums(*(part[stay] for part in sums))
        if not len(left):
            break
    return clear, wins


def _by_goal(
    rows: Bool[Tensor, " d_out"],
    ours: MXFP4 | ScaledE2M1,
    plain: MXFP4 | ScaledE2M1,
    weight: Float32[Tensor, "d_out d"],
    moment: Float64[Tensor, "d d"] | Half,
) -> Bool[Tensor, " d_out"]:
    """Which of some rows have the smaller goal."""
    better, here = torch.zeros_like(rows), rows.nonzero().flatten()
    if len(here):
        moment = moment.whole() if isinstance(moment, Half) else moment
        goals = [goal(_rows(codes, here), weight[here], moment) for codes in (ours, plain)]
        better[here] = goals[0] < goals[1]
    return better


def _rows(codes: MXFP4 | ScaledE2M1, rows: Tensor | slice) -> MXFP4 | ScaledE2M1:
    return type(codes)(*(part[rows] for part in codes))


def unit() -> float:
    """What a float32 number that goes into a matrix product, or comes out, may be off by.

    Torch can be told to round such numbers to TF32 or to bfloat16 first.
    """
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for each backend by itself
        exact = False
    return 2.0**-24 if exact else 2.0**-8
