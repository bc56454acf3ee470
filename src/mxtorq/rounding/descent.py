"""Coordinate descent on codes: each goes where it serves the goal best, given all others.

GPTQ looks at a column once, and at later ones only as far as they can still move. With all codes
chosen, the goal (q - w) H (q - w)^T of a row as a function of one q_j alone is a parabola, least at

    q_j - slope_j,    slope_j = sum_k (H_jk / H_jj) (q_k - w_k)

and the best code of column j is the one nearest to that, under the scale that its block has. A
sweep does this for all columns of the weight from first to last. The idea is that of QuantEase
(arXiv 2309.01885), which goes round the columns as this does, and of CDQuant (arXiv 2406.17542),
which is greedy. Here it starts from what GPTQ left, scales stay, and H is the one without damping.

Never up. A code changes only where the slope's float32 magnitude shrinks: the goal falls by
H_jj (slope_j^2 - (slope_j + step)^2). Slopes are kept up to date in float32 and so are slightly
off; where the bound of `fall` leaves a doubt, the change (q' - q) H (q' + q - 2 w)^T of a row's
goal is computed in float64, and a row that did not fall has its codes back. Ties, and zeros of
either sign, stay.

Price. Slopes, and each sweep, cost 2 d^2 operations a row, a row in doubt as many in float64. As in
GPTQ a change is handed on to the rest of 128 columns after each 32, and to all others after the
128; blocks in which nothing changed hand on nothing. A channel that was never seen (H_jj = 0) has
no slope and is left alone. A matrix d x d in float32 is held besides H.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats import e2m1, e8m0
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import ScaledE2M1
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import Backend, dequantize, pick_able
from mxtorq.rounding.fall import Slopes, no_fall, slopes_of
from mxtorq.rounding.half import Half

_ROWS = 1024  # rows whose change of the goal is computed at once


def require_sweeps(sweeps: int) -> None:
    """Refuse a negative number.

    Raises:
        UsageError: with what the number means.
    """
    if sweeps < 0:
        raise UsageError(
            asked=f"sweeps={sweeps}",
            found="a negative number",
            why="it is how often all codes are looked at again after GPTQ",
            todo="pass sweeps=0 for none, or a small number such as 2",
        )


def descend(
    rounded: MXFP4 | ScaledE2M1,
    weight: Float32[Tensor, "d_out d"],
    moment: Half,
    sweeps: int,
    block: int,
    steps: Iterable[slice],
    backend: Backend | str = Backend.AUTO,
) -> MXFP4 | ScaledE2M1:
    """Codes of no larger goal under the same scales.

    Args:
        rounded: where to start.
        weight: what it stands for.
        moment: H.
        sweeps: at most; it ends before where a sweep changed no code.
        block: columns between two updates of all others: speed alone.
        steps: rows that are worked on at once; rows do not know each other.
        backend: who computes the inner step; the bits are the same.
    """
    slopes, packed = slopes_of(moment), rounded.packed.clone()
    clear = torch.zeros(len(packed), dtype=torch.bool, device=packed.device)
    for rows in steps:
        start = type(rounded)(*(part[rows] for part in rounded))
        codes, clear[rows] = sweep(start, weight[rows], slopes, sweeps, block, backend)
        packed[rows] = e2m1.pack(codes)
    del slopes
    changed = (packed != rounded.packed).any(1)
    for rows in (changed & ~clear).nonzero().flatten().split(_ROWS):
        old = type(rounded)(*(part[rows] for part in rounded))
        before, after = dequantize(old), dequantize(old._replace(packed=packed[rows]))
        errors = (after.double() - weight[rows]) + (before.double() - weight[rows])
        fell = moment.products(after.double() - before, errors) < 0
        packed[rows] = torch.where(fell[:, None], packed[rows], old.packed)
    return rounded._replace(packed=packed)


def sweep(
    rounded: MXFP4 | ScaledE2M1,
    weight: Float32[Tensor, "rows d"],
    slopes: Slopes,
    sweeps: int,
    block: int,
    backend: Backend | str = Backend.AUTO,
) -> tuple[UInt8[Tensor, "rows d"], Bool[Tensor, " rows"]]:
    """The codes after some sweeps as float32 sees them, and whether a goal fell without doubt."""
    numbers = rounded.scales if isinstance(rounded, ScaledE2M1) else e8m0.decode(rounded.e8m0)
    scales, pull = numbers.T.contiguous(), slopes.pull
    codes = e2m1.unpack(rounded.packed).T.contiguous()
    values = dequantize(rounded).T.contiguous()
    blocks = [slice(at, min(at + block, len(values))) for at in range(0, len(values), block)]
    errors, slope = values - weight.T, torch.zeros_like(values)
    for here in blocks:
        slope.addmm_(pull[:, here], errors[here])
    fall = no_fall(slopes, errors)
    before, changes = torch.empty_like(values[:block]), torch.empty_like(values[:block])
    del errors
    for _ in range(sweeps):
        changed = False
        for here in blocks:
            for first in range(here.start, here.stop, BLOCK):
                group, place = (slice(at, at + BLOCK) for at in (first, first - here.start))
                before[place] = slope[group]
                parts = values[group], before[place], codes[group], scales[first // BLOCK]
                changes[place] = move_group_(*parts, pull[group, group].contiguous(), backend)
                slope[here].addmm_(pull[here, group], changes[place])
            made = changes[: here.stop - here.start]
            if bool(made.any()):
                changed = True
                fall.add_(slopes, here, before[: len(made)], made)
                for others in (slice(0, here.start), slice(here.stop, len(values))):
                    slope[others].addmm_(pull[others, here], made)
        fall.end_()
        if not changed:
            break
    return codes.T.contiguous(), fall.claimed > fall.slack(slopes, sweeps, block)


def move_group_(
    values: Float32[Tensor, "32 rows"],
    slopes: Float32[Tensor, "32 rows"],
    codes: UInt8[Tensor, "32 rows"],
    scale: Float32[Tensor, " rows"],
    pull: Float32[Tensor, "32 32"],
    backend: Backend | str = Backend.AUTO,
) -> Float32[Tensor, "32 rows"]:
    """Move the codes of 32 columns one by one; what is added to their values comes back.

    Operations are rounded one by one, as in `group`.

    Args:
        values: of the codes, one column of the weight a row; changed with them.
        slopes: as they are at first; become those that each column had at its turn.
        codes: changed where that lowers the goal.
        scale: of each row.
        pull: H_jk / H_jj in row j.
        backend: who computes.
    """
    if pick_able(backend, values.device, (Backend.NUMBA,)) is Backend.NUMBA:
        from mxtorq.kernels.numba import descent

        return descent.move_group_(values, slopes, codes, scale, pull)
    steps = torch.empty_like(values)
    for j in range(BLOCK):
        multiple = (values[j] - slopes[j]) / scale
        value = e2m1.nearest(multiple) * scale
        step = value - values[j]
        taken = (slopes[j] + step).abs() < slopes[j].abs()  # never where one is NaN
        codes[j] = torch.where(taken, e2m1.encode(multiple), codes[j])
        values[j] = torch.where(taken, value, values[j])
        steps[j] = torch.where(taken, step, 0.0)
        slopes[j + 1 :] += pull[j + 1 :, j, None] * steps[j]
    return steps
