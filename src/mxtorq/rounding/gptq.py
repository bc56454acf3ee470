"""GPTQ: each column's rounding error is made good in the columns that are not rounded yet.

For a row w the goal is (q - w) H (q - w)^T with H the second moment of the site's inputs. Columns
are rounded one by one; after each, the free ones move to the exact minimiser of the (damped) goal
given all that is fixed (GPTQ, arXiv 2210.17323, section 3.3). With H^-1 = U^T U and U upper
triangular in the order of rounding, fixing column j at an error e subtracts e U_jk / U_jj from each
later column k.

Group scales: ``dynamic`` chooses a group's scale from the compensated weights when its first column
is reached; ``static`` chooses all from the weight as it came. Orders: ``forward``; ``backward``,
last column first, as the Babai rounding of WUSH (arXiv 2512.00956) runs; ``descending`` by the
diagonal of H, which with static scales is MR-GPTQ's activation order (arXiv 2509.23202).

Decided here. A row that would end above plain rounding on the undamped goal is given the plain
codes, so no row is ever worse; the papers do not do this. Dynamic scales see every earlier column;
DuQuant++'s released code (arXiv 2604.17789) misses those of the same 128. Under ``log256`` a
dynamic group takes the grid of its 32 columns over all rows, as that code does, and plain rounding
the whole tensor's. A channel that calibration never saw (H_jj = 0) is rounded plainly: the original
sets its weights to 0. The factor is in float64, the weights move in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor

from mxtorq.errors import FormatError, ModelError, UsageError
from mxtorq.formats import e2m1
from mxtorq.formats.mxfp4 import MXFP4, as_blocks
from mxtorq.formats.scales import Scale, ScaledE2M1, assemble, dequantize
from mxtorq.formats.spec import BLOCK
from mxtorq.rounding.base import Rounding
from mxtorq.rounding.exponents import choose_scales, require_exponents, require_scale
from mxtorq.rounding.rtn import RTN

_ROWS = 1024  # rows whose goal is computed at once in float64


class Order(StrEnum):
    """Which columns are rounded first."""

    FORWARD = "forward"
    BACKWARD = "backward"
    DESCENDING = "descending"


class GroupScales(StrEnum):
    """When the scale of a group of 32 columns is chosen."""

    DYNAMIC = "dynamic"
    STATIC = "static"


class Inputs(StrEnum):
    """Which inputs the Hessian is of: as they are, or after their own rounding to MXFP4."""

    PLAIN = "plain"
    ROUNDED = "rounded"


@dataclass(frozen=True, kw_only=True)
class GPTQ(Rounding):
    """Rounding with compensation; the defaults are those of the original."""

    damping: float = 0.01
    """Added to the diagonal, as a part of its mean."""
    order: Order = Order.FORWARD
    scales: GroupScales = GroupScales.DYNAMIC
    exponents: int = 1
    """Exponents that are tried for a group: 1 (the rule's) or 3 (its neighbours too)."""
    inputs: Inputs = Inputs.PLAIN
    """``rounded`` is DuQuant++'s: the Hessian of the activations that the weight will meet."""
    block: int = 128
    """Columns between two updates of all later ones: speed alone."""

    def __post_init__(self) -> None:
        require_exponents(self.exponents)
        if not 0 < self.damping < float("inf"):
            raise UsageError(
                asked=f"damping={self.damping}",
                found="a part of the Hessian's mean diagonal that is not positive and finite",
                why="channels that depend on each other leave the Hessian without an inverse",
                todo="pass a small positive number such as 0.01",
            )
        if self.block < BLOCK or self.block % BLOCK:
            raise UsageError(
                asked=f"block={self.block}",
                found=f"groups of {BLOCK} columns",
                why="an update between two blocks must not cut a group in two",
                todo=f"pass a multiple of {BLOCK} such as 128",
            )
        if self.order is Order.DESCENDING and self.scales is not GroupScales.STATIC:
            raise UsageError(
                asked=f"order={self.order} with scales={self.scales}",
                found="an order in which the columns of a group do not follow each other",
                why="a dynamic scale is chosen when the first of a group's columns is reached, "
                "long before the others have their compensation",
                todo="pass scales=static with order=descending, or order=forward",
            )

    @property
    def compensates(self) -> bool:
        return True

    @property
    def sees_rounded_inputs(self) -> bool:
        return self.inputs is Inputs.ROUNDED

    def check(self, scale: Scale) -> None:
        require_scale(self.exponents, scale)

    def round(
        self, weight: Float32[Tensor, "d_out d"], hessian: Callable[[], Tensor], scale: Scale
    ) -> MXFP4 | ScaledE2M1:
        """As `Rounding.round`.

        Raises:
            UsageError: as `check`, and where the Hessian is not [d, d].
            ModelError: weight or Hessian hold NaN or Inf.
            FormatError: 32 does not divide d, or the damped Hessian is not positive definite.
        """
        self.check(scale)
        plain = RTN(exponents=self.exponents).round(weight, hessian, scale)
        moment = _required(hessian().to(weight.device, torch.float64), weight)
        codes, scales = self.compensated(weight, moment, scale)
        mine = assemble(codes, scales, scale)
        # Strictly: where nothing is gained the bits are those of plain rounding, signed zeros too.
        better = (goal(mine, weight, moment) < goal(plain, weight, moment))[:, None]
        pairs = zip(mine, plain, strict=True)
        return type(plain)(*(torch.where(better, ours, theirs) for ours, theirs in pairs))

    def compensated(
        self, weight: Float32[Tensor, "d_out d"], moment: Float64[Tensor, "d d"], scale: Scale
    ) -> tuple[UInt8[Tensor, "d_out d"], Float32[Tensor, "d_out blocks"]]:
        """Codes and group scales of GPTQ alone, rows that end worse than plain ones included.

        Raises:
            FormatError: the damped Hessian is not positive definite.
        """
        order = self._column_order(moment)
        follow = _compensation(moment, order, self.damping)
        width, rows = weight.shape[1], weight.shape[0]
        free = weight.T[order].contiguous()  # one column of the weight a row, in order of rounding
        groups = [column // BLOCK for column in order.tolist()]
        scales = torch.empty(width // BLOCK, rows, device=weight.device)
        if self.scales is GroupScales.STATIC:
            chosen = choose_scales(as_blocks(weight), scale, self.exponents)
            scales.copy_(chosen.view(rows, -1).T)
        for start in range(0, width, self.block):
            stop = min(start + self.block, width)
            errors = torch.empty(stop - start, rows, device=weight.device)
            for first in range(start, stop, BLOCK):
                last = first + BLOCK
                if self.scales is GroupScales.DYNAMIC:
                    # Back in the weight's own order of columns, so that sums are those of RTN.
                    here = free[first:last][order[first:last].argsort()].T.contiguous()
                    scales[groups[first]] = choose_scales(here, scale, self.exponents)
                for j in range(first, last):
                    error = errors[j - start]
                    _fix(free[j], scales[groups[j]], error)
                    free[j + 1 : last].addr_(follow[j, j + 1 : last], error, alpha=-1)
                done = slice(first - start, last - start)
                free[last:stop].addmm_(follow[first:last, last:stop].T, errors[done], alpha=-1)
            free[stop:].addmm_(follow[start:stop, stop:].T, errors, alpha=-1)
        return e2m1.encode(free)[order.argsort()].T.contiguous(), scales.T.contiguous()

    def _column_order(self, moment: Float64[Tensor, "d d"]) -> Int64[Tensor, " d"]:
        if self.order is Order.DESCENDING:
            return moment.diagonal().argsort(descending=True, stable=True)
        columns = torch.arange(len(moment), device=moment.device)
        return columns if self.order is Order.FORWARD else columns.flip(0)


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


def _fix(
    column: Float32[Tensor, " rows"],
    scales: Float32[Tensor, " rows"],
    error: Float32[Tensor, " rows"],
) -> None:
    """Round one column: it becomes its multiple of the scales, ``error`` what rounding took off.

    The multiple is kept unrounded, so that all codes can be encoded at once later.
    """
    multiple = column / scales
    torch.addcmul(column, e2m1.nearest(multiple), scales, value=-1, out=error)
    column.copy_(multiple)


def _compensation(
    moment: Float64[Tensor, "d d"], order: Int64[Tensor, " d"], damping: float
) -> Float32[Tensor, "d d"]:
    """U_jk / U_jj: how much of column j's error is taken from column k, in the order of rounding.

    No inverse of H is formed. Read backwards H is L L^T; read forwards again, L is an upper
    triangular R with H = R R^T, and U = R^-1.

    Raises:
        FormatError: the damped Hessian is not positive definite.
    """
    lower = _cholesky(moment, order.flip(0), damping)
    identity = torch.eye(len(lower), dtype=torch.float64, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    inverse /= inverse.diagonal().clone()[:, None]
    return inverse.float().flip(0, 1)


def _cholesky(
    moment: Float64[Tensor, "d d"], order: Int64[Tensor, " d"], damping: float
) -> Float64[Tensor, "d d"]:
    """The lower factor of the damped Hessian, its rows and columns in ``order``."""
    ordered = moment[order[:, None], order]
    unseen = ordered.diagonal() == 0
    ordered[unseen] = 0.0
    ordered[:, unseen] = 0.0
    diagonal = ordered.diagonal().masked_fill(unseen, 1.0)
    ordered.diagonal().copy_(diagonal + damping * moment.diagonal().mean())
    result = torch.linalg.cholesky_ex(ordered)
    if result.info:
        raise FormatError(
            asked=f"GPTQ with a Hessian {tuple(moment.shape)} and damping={damping}",
            found="no Cholesky factor of the damped Hessian",
            why="a second moment has no negative eigenvalues, and this matrix has some that the "
            "damping does not lift above zero",
            todo=f"pass a larger damping, such as {10 * damping:g}; if that fails, look at how the "
            "Hessian was made (symmetric? in float64?), or round with rtn",
        )
    lower: Tensor = result.L
    return lower


def _required(
    moment: Float64[Tensor, "..."], weight: Float32[Tensor, "d_out d"]
) -> Float64[Tensor, "d d"]:
    width = weight.shape[1]
    if moment.shape != (width, width):
        raise UsageError(
            asked=f"GPTQ of a weight {tuple(weight.shape)}",
            found=f"a Hessian {tuple(moment.shape)}",
            why="it holds one moment for each pair of the weight's columns",
            todo=f"pass the Hessian [{width}, {width}] of the same, transformed site",
        )
    if not bool(torch.isfinite(moment).all()):
        raise ModelError(
            asked=f"GPTQ with a Hessian {tuple(moment.shape)}",
            found="NaN or Inf in it",
            why="some calibration input was not finite",
            todo="evaluate the model without rounding first, or round with rtn",
        )
    return moment
