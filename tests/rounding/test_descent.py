"""Sweeps over codes: against a loop in float64, never up, and where they end nothing is better."""

import math

import pytest
import torch

import oracles
from mxtorq.formats import e2m1, e8m0
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import NonOCPScale, Scale, ScaledE2M1
from mxtorq.kernels.dispatch import dequantize
from mxtorq.rounding import descent as module
from mxtorq.rounding.descent import descend, move_group_
from mxtorq.rounding.goal import goal
from mxtorq.rounding.gptq import GPTQ, GroupScales, Order
from mxtorq.rounding.half import halve
from mxtorq.rounding.rtn import RTN
from oracles import rounding_problem

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EPS, UNIT = torch.finfo(torch.float64).eps, 2.0**-24
SCALES: list[Scale] = [ScaleRule.FLOOR, ScaleRule.UOS, *NonOCPScale]


def same(one: MXFP4 | ScaledE2M1, other: MXFP4 | ScaledE2M1) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def once(
    rounded: MXFP4 | ScaledE2M1, weight: torch.Tensor, moment: torch.Tensor
) -> MXFP4 | ScaledE2M1:
    rows = [slice(0, len(weight))]
    return descend(rounded, weight, halve(moment), 1, 128, rows)


def scales_of(rounded: MXFP4 | ScaledE2M1) -> torch.Tensor:
    return rounded.scales if isinstance(rounded, ScaledE2M1) else e8m0.decode(rounded.e8m0)


def column_by_column(
    rounded: MXFP4 | ScaledE2M1, weight: torch.Tensor, moment: torch.Tensor
) -> torch.Tensor:
    """The codes after a sweep in float64, each slope computed afresh."""
    codes, scales = e2m1.unpack(rounded.packed), scales_of(rounded).double()
    values = dequantize(rounded).double()
    for j in range(weight.shape[1]):
        slope = (values - weight.double()) @ moment[:, j] / moment[j, j]
        for row in range(len(weight)):
            scale = float(scales[row, j // 32])
            multiple = float(values[row, j] - slope[row]) / scale
            # A slope in float32 may be on the other side of a cut that is this near.
            assert all(abs(abs(multiple) - cut) > 1e-5 for cut in oracles.CUTS), "choose a seed"
            code = sum(abs(multiple) > cut for cut in oracles.CUTS)
            value = math.copysign(MAGNITUDES[code], multiple) * scale
            if abs(value - values[row, j]) > 1e-6 * scale:  # else its zero has a sign to keep
                codes[row, j] = code | (8 if multiple < 0 else 0)
                values[row, j] = value
    return codes


@pytest.mark.parametrize("order", [Order.FORWARD, Order.BACKWARD])
@pytest.mark.parametrize("scale", [ScaleRule.FLOOR, NonOCPScale.FOUR_THIRDS])
def test_every_code_is_that_of_the_best_neighbour(scale: Scale, order: Order) -> None:
    """Three sweeps, over a whole block of columns and a part of one."""
    weight, moment = rounding_problem(4, 160)
    found = GPTQ(order=order).round(weight, lambda: moment, scale)
    for sweeps in (1, 2, 3):
        codes = column_by_column(found, weight, moment)
        assert not torch.equal(codes, e2m1.unpack(found.packed))
        found = GPTQ(order=order, sweeps=sweeps).round(weight, lambda: moment, scale)
        assert torch.equal(e2m1.unpack(found.packed), codes)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("scales", list(GroupScales))
def test_no_row_rises(scale: Scale, scales: GroupScales) -> None:
    """From sweep to sweep, on Hessians without an inverse too; scales stay. Goals are off by at
    most 4 d eps |e| |H| |e|^T."""
    weight, correlated = rounding_problem(40, 96)
    ten = torch.randn(10, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    hessians = [correlated, oracles.spd(96, 1e8, seed=4), ten.T @ ten, torch.ones(96, 96).double()]
    for moment in hessians:
        before = GPTQ(scales=scales).round(weight, lambda h=moment: h, scale)
        first = before
        for _ in range(4):
            after, slack = once(before, weight, moment), torch.zeros(40, dtype=torch.float64)
            for each in (before, after):
                error = (dequantize(each).double() - weight).abs()
                slack += 4 * 96 * EPS * ((error @ moment.abs()) * error).sum(1)
            assert torch.equal(after[1], before[1])
            assert (goal(after, weight, moment) <= goal(before, weight, moment) + slack).all()
            before = after
        assert goal(before, weight, moment).sum() < 0.99 * goal(first, weight, moment).sum()


def test_it_ends_where_nothing_changes_and_no_single_code_is_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Among all 16 codes of each column. What float32 slopes hide: a slope's sum, of 96 terms in
    blocks, is off by at most 2 (96 + 10) u of its magnitudes, the multiple by 2 u of itself."""
    weight, moment = rounding_problem(12, 96)
    groups = []
    move = module.move_group_
    monkeypatch.setattr(module, "move_group_", lambda *args: groups.append(1) or move(*args))
    start = GPTQ().round(weight, lambda: moment, ScaleRule.FLOOR)
    end = GPTQ(sweeps=1000).round(weight, lambda: moment, ScaleRule.FLOOR)
    done = len(groups) // 3
    assert 3 < done < 1000
    assert same(GPTQ(sweeps=done).round(weight, lambda: moment, ScaleRule.FLOOR), end)
    assert same(GPTQ(sweeps=done - 1).round(weight, lambda: moment, ScaleRule.FLOOR), end)
    assert not same(GPTQ(sweeps=done - 2).round(weight, lambda: moment, ScaleRule.FLOOR), end)
    while not same(end, settled := once(end, weight, moment)):  # slopes afresh, so nearer
        end = settled
    better = []
    for rounded in (start, end):
        values, scale = dequantize(rounded).double(), scales_of(rounded).double()
        errors = values - weight
        slope = errors @ moment / moment.diagonal()
        size = errors.abs() @ (moment / moment.diagonal()).abs()
        possible = e2m1.decode(torch.arange(16, dtype=torch.uint8)).double()
        step = possible * scale.repeat_interleave(32, 1)[..., None] - values[..., None]
        change = step * (2 * slope[..., None] + step)
        off = 2 * (96 + 10) * UNIT * size + 2 * 2 * UNIT * (values - slope).abs()
        better.append(int((change < -2 * step.abs() * off[..., None]).sum()))
    assert better[0] > 0
    assert better[1] == 0


def test_channels_that_were_never_seen_are_left_alone() -> None:
    weight, moment = rounding_problem(9, 96)
    unseen = [0, 31, 40, 95]
    moment[unseen] = 0.0
    moment[:, unseen] = 0.0
    weight[:, 40] = -1e-9  # a negative zero
    before = GPTQ().round(weight, lambda: moment, ScaleRule.FLOOR)
    after = GPTQ(sweeps=2).round(weight, lambda: moment, ScaleRule.FLOOR)
    codes = [e2m1.unpack(each.packed) for each in (before, after)]
    assert torch.equal(codes[0][:, unseen], codes[1][:, unseen])
    assert not torch.equal(*codes)
    assert (codes[1][:, 40] == 8).all()
    nothing = torch.zeros_like(moment)
    plain = RTN().round(weight, lambda: moment, ScaleRule.FLOOR)
    assert same(GPTQ(sweeps=2).round(weight, lambda: nothing, ScaleRule.FLOOR), plain)


def test_the_width_of_updates_and_rows_that_go_together_change_no_code() -> None:
    weight, moment = rounding_problem(20, 160)
    start, half = GPTQ().round(weight, lambda: moment, ScaleRule.FLOOR), halve(moment)
    first, *others = (
        descend(start, weight, half, 3, block, rows)
        for block, rows in (
            (128, [slice(0, 20)]),
            (32, [slice(0, 20)]),
            (256, [slice(0, 20)]),
            (128, [slice(0, 7), slice(7, 20)]),
        )
    )
    assert not same(start, first)
    assert all(same(first, other) for other in others)


def test_a_row_in_doubt_that_did_not_fall_has_its_codes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows 0 and 1 were made worse, of which float32 was sure of one; row 2 stayed in doubt too."""
    weight, moment = rounding_problem(4, 64)
    start = GPTQ().round(weight, lambda: moment, ScaleRule.FLOOR)
    better = once(start, weight, moment)
    assert (better.packed != start.packed).any(1).all()
    codes = e2m1.unpack(better.packed)
    codes[:2] = 7
    clear = torch.tensor([False, True, False, True])
    monkeypatch.setattr(module, "sweep", lambda *args: (codes, clear))
    found = once(start, weight, moment)
    assert torch.equal(found.packed[0], start.packed[0])
    assert torch.equal(found.packed[1:], e2m1.pack(codes[1:]))


@pytest.mark.parametrize("power", [-240, 0, 240])
def test_the_size_of_a_hessian_does_not_matter(power: int) -> None:
    weight, moment = rounding_problem(6, 64)
    expected = GPTQ(sweeps=2).round(weight, lambda: moment, ScaleRule.FLOOR)
    found = GPTQ(sweeps=2).round(weight, lambda: moment * 2.0**power, ScaleRule.FLOOR)
    assert same(found, expected)


def test_a_zero_keeps_its_sign_and_a_tie_its_code() -> None:
    """Slope 0.25 at scale 1: -0.25 lies between the codes 0 and -0.5 and is no nearer to that."""
    values = torch.zeros(32, 3)
    values[:, 1] = -0.0
    values[:, 2] = 1.0
    codes, slopes = e2m1.encode(values), torch.zeros(32, 3)
    slopes[0], slopes[1] = 0.25, -0.1
    kept = codes.clone(), values.clone()
    steps = move_group_(values, slopes, codes, torch.ones(3), torch.eye(32), "eager")
    assert not steps.any()
    assert torch.equal(codes, kept[0])
    assert torch.equal(values.view(torch.int32), kept[1].view(torch.int32))
