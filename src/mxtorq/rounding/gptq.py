"""GPTQ: each column's rounding error is made good in the columns that are not rounded yet.

For a row w the goal is (q - w) H (q - w)^T with H the second moment of the site's inputs. Columns
are rounded one by one, each from where it is the exact minimiser of the (damped) goal given all
that is fixed (GPTQ, arXiv 2210.17323, section 3.3). `factor` has the triangle that says where that
is, `group` rounds 32 columns, and here errors are handed on: to the rest of a block of 128 columns
after each group, to all later ones after each block.

Group scales: ``dynamic`` chooses a group's scale from the compensated weights when its first column
is reached; ``static`` chooses all from the weight as it came. Orders: ``forward``; ``backward``,
last column first, as the Babai rounding of WUSH (arXiv 2512.00956) runs; ``descending`` by the
diagonal of H, which with static scales is MR-GPTQ's activation order (arXiv 2509.23202). Beyond the
original: `search` chooses exponents by their outputs, `descent` goes over the codes once more.

Decided here. A row that would end above plain rounding on the undamped goal is given the plain
codes (`goal`), so no row is ever worse; the papers do not do this. Dynamic scales see every earlier
column; DuQuant++'s released code (arXiv 2604.17789) misses those of the same 128. Under ``log256``
a dynamic group takes the grid of its 32 columns over all rows, as that code does, and plain
rounding the whole tensor's. A channel that calibration never saw (H_jj = 0) is rounded plainly: the
original sets its weights to 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, as_blocks
from mxtorq.formats.scales import NonOCPScale, Scale, ScaledE2M1, assemble
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import Backend
from mxtorq.rounding.base import Rounding, require_moment
from mxtorq.rounding.correction import correction
from mxtorq.rounding.descent import descend, require_sweeps
from mxtorq.rounding.exponents import choose_scales, require_exponents, require_scale
from mxtorq.rounding.factor import Factor, factorize, factorize_
from mxtorq.rounding.goal import Sums, better_rows, no_sums
from mxtorq.rounding.group import fix_group_
from mxtorq.rounding.half import halve
from mxtorq.rounding.rtn import RTN
from mxtorq.rounding.search import Search, fix_by_outputs_, require_search

_NUMBERS = 2**24
"""Of a weight, that are rounded together on a CPU; elsewhere 128 times more."""


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
    """Which inputs the Hessian is of: as they are, or after their own rounding to MXFP4. Corrected
    is as they are, for weights that were fitted to rounded ones beforehand (`correction`)."""

    PLAIN = "plain"
    ROUNDED = "rounded"
    CORRECTED = "corrected"


@dataclass(frozen=True, kw_only=True)
class GPTQ(Rounding):
    """Rounding with compensation; the defaults are those of the original."""

    damping: float = 0.01
    """Added to the diagonal, as a part of its mean."""
    order: Order = Order.FORWARD
    scales: GroupScales = GroupScales.DYNAMIC
    exponents: int = 1
    """Exponents that are tried for a group: 1 (the rule's) or 3 (its neighbours too)."""
    search: Search = Search.VALUES
    """By what they are compared: ``outputs`` is the loss of the group when it is rounded."""
    sweeps: int = 0
    """Of coordinate descent on the codes afterwards, at most."""
    inputs: Inputs = Inputs.PLAIN
    """``rounded`` is DuQuant++'s: the Hessian of the activations that the weight will meet."""
    coherence: float = 3.0
    """Of ``corrected``: how much more a fixed error of the signal counts than noise."""
    ridge: float = 0.03
    """Of ``corrected``: what a change of the weights costs."""
    block: int = 128
    """Columns between two updates of all later ones: speed alone."""

    def __post_init__(self) -> None:
        require_exponents(self.exponents)
        dynamic = self.scales is GroupScales.DYNAMIC
        require_search(self.search, self.exponents, dynamic=dynamic)
        require_sweeps(self.sweeps)
        if not 0 < self.damping < float("inf"):
            raise UsageError(
                asked=f"damping={self.damping}",
                found="a part of the Hessian's mean diagonal that is not positive and finite",
                why="channels that depend on each other leave the Hessian without an inverse",
                todo="pass a small positive number such as 0.01",
            )
        for name, value, usual in (
            ("coherence", self.coherence, GPTQ.coherence),
            ("ridge", self.ridge, GPTQ.ridge),
        ):
            if value != usual and not self.corrects_inputs:
                raise UsageError(
                    asked=f"{name}={value} with inputs={self.inputs}",
                    found="weights that are not corrected for what rounding does to inputs",
                    why=f"{name} is a penalty of that correction",
                    todo=f"pass inputs=corrected, or leave {name} out",
                )
            if not 0 <= value < float("inf") or (name == "ridge" and value == 0):
                raise UsageError(
                    asked=f"{name}={value}",
                    found="a number that is negative or not finite, or a ridge of zero",
                    why="the weights are fitted by least squares with these as penalties",
                    todo="pass coherence=0 for the plain fit or a small number such as 3, and a "
                    "positive ridge such as 0.03",
                )
        if self.block < BLOCK or self.block % BLOCK:
            raise UsageError(
                asked=f"block={self.block}",
                found=f"groups of {BLOCK} columns",
                why="an update between two blocks must not cut a group in two",
                todo=f"pass a multiple of {BLOCK} such as 128",
            )
        if self.order is Order.DESCENDING and dynamic:
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

    @property
    def corrects_inputs(self) -> bool:
        return self.inputs is Inputs.CORRECTED

    def correction(
        self,
        plain: Float64[Tensor, "n n"],
        rounded: Float64[Tensor, "n n"],
        cross: Float64[Tensor, "n n"],
    ) -> Float64[Tensor, "n n"]:
        return correction(plain, rounded, cross, ridge=self.ridge, coherence=self.coherence)

    def check(self, scale: Scale) -> None:
        require_scale(self.exponents, scale)

    def round(
        self,
        weight: Float32[Tensor, "d_out d"],
        hessian: Callable[[], Tensor],
        scale: Scale,
        *,
        backend: Backend | str = Backend.AUTO,
    ) -> MXFP4 | ScaledE2M1:
        """As `Rounding.round`.

        Raises:
            UsageError: as `check`, and where the Hessian is not [d, d].
            ModelError: weight or Hessian hold NaN or Inf.
            FormatError: 32 does not divide d, or the damped Hessian is not positive definite.
        """
        return self.round_(weight, lambda: hessian().clone(), scale, backend=backend)

    def round_(
        self,
        weight: Float32[Tensor, "d_out d"],
        hessian: Callable[[], Tensor],
        scale: Scale,
        *,
        backend: Backend | str = Backend.AUTO,
    ) -> MXFP4 | ScaledE2M1:
        """As `round`; the Hessian is overwritten.

        Raises:
            MxtorqError: as `round`.
        """
        self.check(scale)
        plain = RTN(exponents=self.exponents).round(weight, hessian, scale, backend=backend)
        moment = require_moment(hessian().to(weight.device, torch.float64), weight)
        order, half = self._column_order(moment), halve(moment)
        factor = factorize_(moment, order, self.damping)
        del moment
        found = []
        for rows in _steps(weight, scale):
            codes, scales, sums = self._run(weight[rows], factor, scale, backend)
            found.append((*sums, *assemble(codes, scales, scale)))
        parts = [torch.cat(each) for each in zip(*found, strict=True)]
        sums, mine = Sums(*parts[:3]), type(plain)(*parts[3:])
        # Strictly: where nothing is gained the bits are those of plain rounding, signed zeros too.
        width = weight.shape[1]
        terms = self.block + width // BLOCK + 2 * width // self.block
        better = better_rows(sums, terms, mine, plain, weight, half, factor)[:, None]
        pairs = zip(mine, plain, strict=True)
        best = type(plain)(*(torch.where(better, ours, theirs) for ours, theirs in pairs))
        if not self.sweeps:
            return best
        del factor  # makes room
        steps = _steps(weight, scale)
        return descend(best, weight, half, self.sweeps, self.block, steps, backend)

    def compensated(
        self,
        weight: Float32[Tensor, "d_out d"],
        moment: Float64[Tensor, "d d"],
        scale: Scale,
        *,
        backend: Backend | str = Backend.AUTO,
    ) -> tuple[UInt8[Tensor, "d_out d"], Float32[Tensor, "d_out blocks"]]:
        """Codes and group scales of GPTQ alone, rows that end worse than plain ones included.

        Raises:
            FormatError: the damped Hessian is not positive definite.
        """
        factor = factorize(moment, self._column_order(moment), self.damping)
        codes, scales, _ = self._run(weight, factor, scale, backend)
        return codes, scales

    def _run(
        self,
        weight: Float32[Tensor, "d_out d"],
        factor: Factor,
        scale: Scale,
        backend: Backend | str,
    ) -> tuple[UInt8[Tensor, "d_out d"], Float32[Tensor, "d_out blocks"], Sums]:
        """Codes, scales, and the sums of the errors that are left."""
        rows, width = weight.shape
        order, pull = factor.order, factor.pull
        groups = [column // BLOCK for column in order.tolist()]
        free = factor.columns(weight)  # becomes the errors that are left
        moves = torch.zeros_like(free)  # of each column by the errors of all columns before
        codes = torch.empty_like(free, dtype=torch.uint8)
        scales = torch.empty(width // BLOCK, rows, device=weight.device)
        if self.scales is GroupScales.STATIC:
            blocks = as_blocks(weight)
            chosen = choose_scales(blocks, scale, self.exponents, backend=backend)
            scales.copy_(chosen.view(rows, -1).T)
        # With one exponent a rule looks at the largest magnitude alone, in any order of columns.
        dynamic = self.scales is GroupScales.DYNAMIC
        rule = scale if dynamic and self.exponents == 1 and isinstance(scale, ScaleRule) else None
        sums = no_sums(rows, weight.device)
        for start in range(0, width, self.block):
            stop = min(start + self.block, width)
            for first in range(start, stop, BLOCK):
                here = slice(first, first + BLOCK)
                follow = factor.follow[first // BLOCK]
                columns = torch.addmm(free[here], follow.T, moves[here])
                if self.search is Search.OUTPUTS:
                    state = columns, free[here], moves[here], factor, here, scales
                    codes[here] = fix_by_outputs_(*state, groups[first], ScaleRule(scale), backend)
                else:
                    if dynamic and rule is None:
                        # Back in the weight's own order of columns, so that sums are those of RTN.
                        own = columns[order[here].argsort()].T.contiguous()
                        chosen = choose_scales(own, scale, self.exponents, backend=backend)
                        scales[groups[first]] = chosen
                    codes[here] = fix_group_(columns, follow, scales, groups[here], rule, backend)
                free[here] -= columns
                moves[here].addmm_(pull[here, here], free[here])
                after = slice(first + BLOCK, stop)
                moves[after].addmm_(pull[after, here], free[here])
            block = slice(start, stop)
            moves[stop:].addmm_(pull[stop:, block], free[block])
            sums.add_errors_(factor, block, free[block])
            sums.add_outputs_(factor, block, moves[block])
        return codes[order.argsort()].T.contiguous(), scales.T.contiguous(), sums

    def _column_order(self, moment: Float64[Tensor, "d d"]) -> Int64[Tensor, " d"]:
        if self.order is Order.DESCENDING:
            return moment.diagonal().argsort(descending=True, stable=True)
        columns = torch.arange(len(moment), device=moment.device)
        return columns if self.order is Order.FORWARD else columns.flip(0)


def _steps(weight: Float32[Tensor, "d_out d"], scale: Scale) -> Iterator[slice]:
    """Rows whose scratch, thrice the size of their weights, is in memory at once.

    Rows do not know each other, but under a scale that looks at all of them.
    """
    rows, width = weight.shape
    most = _NUMBERS if weight.device.type == "cpu" else 128 * _NUMBERS
    step = rows if scale is NonOCPScale.LOG256 else max(BLOCK, most // width // BLOCK * BLOCK)
    return (slice(start, start + step) for start in range(0, rows, max(1, step)))
