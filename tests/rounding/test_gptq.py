"""GPTQ against column-by-column conditional minimisation, and what it must keep in any case."""

import math
from collections.abc import Iterable

import pytest
import torch

import oracles
from mxtorq.errors import FormatError, ModelError, UsageError
from mxtorq.formats import e2m1, e8m0, reference
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import (
    NonOCPScale,
    Scale,
    ScaledE2M1,
    assemble,
    block_scales,
)
from mxtorq.kernels.dispatch import dequantize
from mxtorq.rounding import ROUNDINGS
from mxtorq.rounding import gptq as module
from mxtorq.rounding.goal import goal
from mxtorq.rounding.gptq import GPTQ, GroupScales, Inputs, Order
from mxtorq.rounding.rtn import RTN

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EPS = torch.finfo(torch.float64).eps
SCALES: list[Scale] = [*ScaleRule, *NonOCPScale]
WAYS = [
    (order, scales)
    for order in Order
    for scales in GroupScales
    if (order, scales) != (Order.DESCENDING, GroupScales.DYNAMIC)
]


def weight(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.exp2(2 * torch.randn(1, width, generator=draw))
    return torch.randn(rows, width, generator=draw) * spread * 0.02


def correlated(width: int, seed: int = 0) -> torch.Tensor:
    """The second moment of inputs that share a third of their dimensions, plus a little noise."""
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(width // 3, width, dtype=torch.float64, generator=draw)
    loud = torch.exp2(torch.randn(width, dtype=torch.float64, generator=draw))
    moment = (few.T @ few / len(few) + 0.05 * torch.eye(width)) * loud[:, None] * loud
    return (moment + moment.T) / 2


def same(one: MXFP4 | ScaledE2M1, other: MXFP4 | ScaledE2M1) -> bool:
    parts = zip(one, other, strict=True)
    return type(one) is type(other) and all(torch.equal(*pair) for pair in parts)


def group_scale(block: list[float], scale: Scale, exponents: int) -> float:
    """One group's scale from exact logarithms, and its search from the definition."""
    amax = max(map(abs, block))
    if scale is NonOCPScale.FOUR_THIRDS:
        return 4 / 3 * 2.0 ** (reference.scale_byte(amax, ScaleRule.FLOOR) - 127)
    own = reference.scale_byte(amax, ScaleRule(scale))
    choices = [2.0 ** (own - 127 + step) for step in (0, -1, 1)[:exponents]]
    errors = [sum((nearest(x / s)[1] * s - x) ** 2 for x in block) for s in choices]
    return choices[errors.index(min(errors))]


def nearest(multiple: float) -> tuple[int, float]:
    """The code of a number that is a multiple of its scale, and its value."""
    code = sum(abs(multiple) > cut for cut in oracles.CUTS)
    value = math.copysign(MAGNITUDES[code], multiple)
    return code | (8 if math.copysign(1, multiple) < 0 else 0), value


def column_by_column(
    w: torch.Tensor,
    moment: torch.Tensor,
    order: Iterable[int],
    scale: Scale,
    *,
    static: bool,
    exponents: int = 1,
    damping: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round in ``order``; after each column solve for all that are free, in float64.

    With the errors e_Q of fixed columns the goal is least at e_F = -e_Q H_QF H_FF^-1.
    """
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment))
    w = w.double()
    current, value = w.clone(), w.clone()
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    scales = torch.zeros(len(w), w.shape[1] // 32, dtype=torch.float64)

    def choose(group: int) -> None:
        block = current[:, 32 * group : 32 * group + 32]
        if scale is NonOCPScale.LOG256:
            scales[:, group] = block_scales(block.float().contiguous(), scale)
        else:
            chosen = [group_scale(row, scale, exponents) for row in block.tolist()]
            scales[:, group] = torch.tensor(chosen, dtype=torch.float64)

    if static and scale is NonOCPScale.LOG256:
        scales[:] = block_scales(w.float().unflatten(1, (-1, 32)), scale)
    elif static:
        for group in range(scales.shape[1]):
            choose(group)
    done: list[int] = []
    free = list(order)
    while free:
        column = free.pop(0)
        group = column // 32
        if not static and group not in {j // 32 for j in done}:
            choose(group)
        for row in range(len(w)):
            s = float(scales[row, group])
            multiple = float(current[row, column]) / s
            # Weights that moved in float32 may be on the other side of a cut that is this near.
            assert all(abs(abs(multiple) - cut) > 1e-5 for cut in oracles.CUTS), "choose a seed"
            codes[row, column], of_scale = nearest(multiple)
            value[row, column] = of_scale * s
        done.append(column)
        if free:
            error = value[:, done] - w[:, done]
            push = torch.linalg.solve(damped[free][:, free], damped[free][:, done] @ error.T)
            current[:, free] = w[:, free] - push.T
    return codes, scales


def column_order(order: Order, moment: torch.Tensor) -> list[int]:
    columns = range(len(moment))
    if order is Order.FORWARD:
        return list(columns)
    if order is Order.BACKWARD:
        return list(reversed(columns))
    return sorted(columns, key=lambda j: -float(moment[j, j]))


# Against conditional minimisation


@pytest.mark.parametrize(
    ("scale", "exponents"),
    [(ScaleRule.FLOOR, 1), (ScaleRule.RCEIL, 1), (ScaleRule.UOS, 1), (ScaleRule.FLOOR, 3)]
    + [(scale, 1) for scale in NonOCPScale],
)
@pytest.mark.parametrize(("order", "scales"), WAYS)
def test_every_code_is_that_of_conditional_minimisation(
    order: Order, scales: GroupScales, scale: Scale, exponents: int
) -> None:
    """All codes and exponents, by equality. Rows that fall back to RTN would be no test."""
    w, moment = weight(4, 96), correlated(96)
    codes, group_scales = column_by_column(
        w,
        moment,
        column_order(order, moment),
        scale,
        static=scales is GroupScales.STATIC,
        exponents=exponents,
    )
    found = GPTQ(order=order, scales=scales, exponents=exponents).round(w, lambda: moment, scale)
    plain = RTN(exponents=exponents).round(w, lambda: moment, scale)
    expected = assemble(codes, group_scales.float(), scale)
    assert (goal(expected, w, moment) < goal(plain, w, moment)).all()
    assert type(found) is type(expected)
    assert torch.equal(e2m1.unpack(found.packed), codes)
    if isinstance(found, MXFP4):
        assert torch.equal(found.e8m0, expected.e8m0)
    else:
        # A scale follows a weight that moved in float32: at most 96 additions of its own size.
        bound = 2 * 96 * torch.finfo(torch.float32).eps
        assert torch.allclose(found.scales.double(), group_scales, rtol=bound, atol=0.0)


def test_the_orders_differ() -> None:
    """The oracle would not notice a wrong order if all orders gave the same codes."""
    w, moment = weight(4, 96), correlated(96)
    results = [
        GPTQ(order=order, scales=GroupScales.STATIC).round(w, lambda: moment, ScaleRule.FLOOR)
        for order in Order
    ]
    assert not any(same(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_static_scales_are_those_of_the_weight_as_it_came() -> None:
    w, moment = weight(6, 128), correlated(128)
    plain = block_scales(w.unflatten(1, (-1, 32)), ScaleRule.FLOOR)
    for order in Order:
        rounding = GPTQ(order=order, scales=GroupScales.STATIC)
        assert torch.equal(rounding.compensated(w, moment, ScaleRule.FLOOR)[1], plain)
    assert not torch.equal(GPTQ().compensated(w, moment, ScaleRule.FLOOR)[1], plain)


@pytest.mark.parametrize(("order", "scales"), WAYS)
def test_channels_that_were_never_seen_are_rounded_plainly(
    order: Order, scales: GroupScales
) -> None:
    w, moment = weight(5, 96), correlated(96)
    unseen = [0, 31, 40, 95]
    moment[unseen] = 0.0
    moment[:, unseen] = 0.0
    found = GPTQ(order=order, scales=scales).round(w, lambda: moment, ScaleRule.FLOOR)
    codes, _ = column_by_column(
        w,
        moment,
        column_order(order, moment),
        ScaleRule.FLOOR,
        static=scales is GroupScales.STATIC,
    )
    assert torch.equal(e2m1.unpack(found.packed), codes)
    scale = e8m0.decode(found[1][:, [j // 32 for j in unseen]])
    assert torch.equal(codes[:, unseen], e2m1.encode(w[:, unseen] / scale))


def test_damping_is_never_raised_behind_the_user_s_back() -> None:
    """Rank 32 of 96 less 3 % of the mean: 1 % of damping leaves it indefinite, 10 % does not."""
    w = weight(4, 96)
    few = torch.randn(32, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    moment = few.T @ few / 32
    moment -= 0.03 * moment.diagonal().mean() * torch.eye(96)
    with pytest.raises(FormatError, match=r"a larger damping, such as 0\.1"):
        GPTQ().compensated(w, moment, ScaleRule.FLOOR)
    codes, _ = GPTQ(damping=0.1).compensated(w, moment, ScaleRule.FLOOR)
    oracle = [
        column_by_column(w, moment, range(96), ScaleRule.FLOOR, static=False, damping=damping)[0]
        for damping in (0.1, 0.2)
    ]
    assert torch.equal(codes, oracle[0])
    assert not torch.equal(codes, oracle[1])


def test_a_hessian_that_is_none_is_an_error_of_ours() -> None:
    moment = correlated(64)
    moment[3, 5] = moment[5, 3] = 1e4 * moment.diagonal().max()
    with pytest.raises(FormatError, match=r"no Cholesky factor(.|\n)*symmetric\?.*rtn"):
        GPTQ().round(weight(2, 64), lambda: moment, ScaleRule.FLOOR)


# A Hessian without correlations


def hard_rows(width: int) -> torch.Tensor:
    """Random rows, zeros, a zero block, the smallest and rather large numbers, signed zeros."""
    w = weight(7, width, seed=5)
    w[1] = 0.0
    w[2, 32:64] = 0.0
    w[3] *= 2.0**-130
    w[4] *= 2.0**100
    w[5, ::3] = -0.0
    return w


@pytest.mark.parametrize("exponents", [1, 3])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("order", "scales"), WAYS)
def test_an_identity_makes_it_rtn_to_the_bit(
    order: Order, scales: GroupScales, scale: Scale, exponents: int
) -> None:
    rounding = GPTQ(order=order, scales=scales, exponents=exponents)
    w, moment = hard_rows(64), 2.5 * torch.eye(64, dtype=torch.float64)
    if exponents == 3 and not isinstance(scale, ScaleRule):
        with pytest.raises(UsageError, match="exponents=1"):
            rounding.check(scale)
        return
    sliced = scale is NonOCPScale.LOG256 and scales is GroupScales.DYNAMIC
    if not sliced:
        expected = RTN(exponents=exponents).round(w, lambda: moment, scale)
        assert same(rounding.round(w, lambda: moment, scale), expected)
    # Compensation itself, without the comparison of rows that would hide a mistake in it. It may
    # lose the sign of a zero.
    codes, chosen = rounding.compensated(w, moment, scale)
    blocks = w.unflatten(1, (-1, 32))
    if sliced:
        plain = torch.stack([block_scales(blocks[:, b], scale) for b in range(2)], dim=1)
    elif exponents == 3:
        plain = e8m0.decode(expected[1])
    else:
        plain = block_scales(blocks, scale)
    assert torch.equal(chosen, plain)
    assert torch.equal(e2m1.decode(codes), e2m1.nearest(blocks / plain[..., None]).flatten(1))


@pytest.mark.parametrize(("order", "scales"), WAYS)
def test_a_hessian_of_zeros_makes_it_rtn(order: Order, scales: GroupScales) -> None:
    w, nothing = weight(3, 64), torch.zeros(64, 64, dtype=torch.float64)
    rounding = GPTQ(order=order, scales=scales)
    expected = RTN().round(w, lambda: nothing, ScaleRule.FLOOR)
    assert same(rounding.round(w, lambda: nothing, ScaleRule.FLOOR), expected)
    codes, _ = rounding.compensated(w, nothing, ScaleRule.FLOOR)
    assert torch.equal(codes, e2m1.unpack(expected.packed))


# The goal


def hessians(width: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    rank_one = torch.randn(1, width, dtype=torch.float64, generator=draw)
    ten = torch.randn(10, width, dtype=torch.float64, generator=draw)
    return [
        correlated(width),
        oracles.spd(width, 1.0, seed=3),
        oracles.spd(width, 1e8, seed=4),
        rank_one.T @ rank_one,
        ten.T @ ten,
        torch.ones(width, width, dtype=torch.float64),
    ]


@pytest.mark.parametrize("scale", [ScaleRule.FLOOR, ScaleRule.FLOOR6, *NonOCPScale])
@pytest.mark.parametrize(("order", "scales"), WAYS)
def test_no_row_ends_above_rtn(order: Order, scales: GroupScales, scale: Scale) -> None:
    """Singular Hessians too. The goal is computed here as a trace of matrices, whose 2 d^2 sums
    differ from others by at most 4 d eps |e| |H| |e|^T."""
    for moment in hessians(64):
        w = weight(24, 64, seed=6)
        goals, slack = [], torch.zeros(24, dtype=torch.float64)
        for rounding in (GPTQ(order=order, scales=scales), RTN()):
            error = dequantize(rounding.round(w, lambda h=moment: h, scale)).double() - w
            goals.append(torch.einsum("ri,ij,rj->r", error, moment, error))
            slack += 4 * 64 * EPS * ((error.abs() @ moment.abs()) * error.abs()).sum(1)
        assert (goals[0] <= goals[1] + slack).all()


def test_rows_that_compensation_harms_are_rounded_plainly() -> None:
    """There are such rows, and each row is one of the two, whichever is better."""
    w, moment = weight(64, 96, seed=6), oracles.spd(96, 1e8, seed=4)
    ours, plain = GPTQ(damping=3.0), RTN()
    alone = assemble(*ours.compensated(w, moment, ScaleRule.FLOOR6), ScaleRule.FLOOR6)
    direct = plain.round(w, lambda: moment, ScaleRule.FLOOR6)
    harmed = goal(alone, w, moment) >= goal(direct, w, moment)
    assert 0 < int(harmed.sum()) < 64
    found = ours.round(w, lambda: moment, ScaleRule.FLOOR6)
    for mine, compensated, rtn in zip(found, alone, direct, strict=True):
        assert torch.equal(mine, torch.where(harmed[:, None], rtn, compensated))


@pytest.mark.parametrize("scale", [ScaleRule.FLOOR, ScaleRule.UOS, *NonOCPScale])
@pytest.mark.parametrize(("order", "scales"), WAYS)
def test_correlated_inputs_reward_it(order: Order, scales: GroupScales, scale: Scale) -> None:
    """In the sum over rows, without the choice of the better of two for each."""
    w, moment = weight(32, 96), correlated(96)
    rounding = GPTQ(order=order, scales=scales)
    ours = assemble(*rounding.compensated(w, moment, scale), scale)
    plain = RTN().round(w, lambda: moment, scale)
    assert goal(ours, w, moment).sum() < goal(plain, w, moment).sum()


def test_goal_is_the_mean_square_of_the_outputs_errors() -> None:
    w = weight(5, 64)
    inputs = oracles.activations(200, 64, outliers=3, seed=1).double()
    codes = RTN().round(w, torch.Tensor, ScaleRule.FLOOR)
    outputs = inputs @ (dequantize(codes).double() - w).T
    direct = outputs.square().mean(0)
    found = goal(codes, w, inputs.T @ inputs / 200)
    # Sums of 200 + 2 * 64 products of one sign at the end, relative to sums of magnitudes.
    size = (inputs.abs() @ (dequantize(codes).double() - w).abs().T).square().mean(0)
    assert ((found - direct).abs() <= 2 * 328 * EPS * size).all()


# What must not matter


@pytest.mark.parametrize(("order", "scales"), WAYS)
@pytest.mark.parametrize("scale", [ScaleRule.FLOOR, NonOCPScale.LOG256])
def test_the_width_of_updates_changes_no_code(
    order: Order, scales: GroupScales, scale: Scale
) -> None:
    """160 columns: whole blocks, a last one that is shorter, and one block that is too wide."""
    w, moment = weight(8, 160), correlated(160)
    first, *others = (
        GPTQ(order=order, scales=scales, block=block).round(w, lambda: moment, scale)
        for block in (128, 32, 64, 256)
    )
    assert all(torch.equal(first.packed, other.packed) for other in others)


def test_it_is_deterministic_and_leaves_its_arguments_alone() -> None:
    w, moment = weight(8, 96), correlated(96)
    moment[7] = moment[:, 7] = 0.0
    before = w.clone(), moment.clone()
    first, second = (GPTQ().round(w, lambda: moment, ScaleRule.FLOOR) for _ in range(2))
    assert same(first, second)
    assert torch.equal(w, before[0])
    assert torch.equal(moment, before[1])


def test_rows_are_independent() -> None:
    w, moment = weight(8, 96), correlated(96)
    codes, scales = GPTQ().compensated(w, moment, ScaleRule.FLOOR)
    some = GPTQ().compensated(w[2:5].contiguous(), moment, ScaleRule.FLOOR)
    assert torch.equal(some[0], codes[2:5])
    assert torch.equal(some[1], scales[2:5])


@pytest.mark.parametrize("scale", [ScaleRule.FLOOR6, *NonOCPScale])
@pytest.mark.parametrize("exponents", [1, 3])
def test_rows_that_are_rounded_together_do_not_matter(
    scale: Scale, exponents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exponents == 3 and not isinstance(scale, ScaleRule):
        return
    w, moment = weight(150, 96), correlated(96)
    expected = GPTQ(exponents=exponents).round(w, lambda: moment, scale)
    runs = []
    run = GPTQ._run
    monkeypatch.setattr(GPTQ, "_run", lambda *args: runs.append(len(args[1])) or run(*args))
    monkeypatch.setattr(module, "_NUMBERS", 96 * 64)
    assert same(GPTQ(exponents=exponents).round(w, lambda: moment, scale), expected)
    assert runs == ([150] if scale is NonOCPScale.LOG256 else [64, 64, 22])


@pytest.mark.parametrize("order", list(Order))
def test_a_hessian_that_is_given_away_is_overwritten(order: Order) -> None:
    rounding = GPTQ(order=order, scales=GroupScales.STATIC)
    w, moment = weight(70, 96), correlated(96)
    given = moment.clone()
    expected = rounding.round(w, lambda: moment, ScaleRule.FLOOR)
    assert same(rounding.round_(w, lambda: given, ScaleRule.FLOOR), expected)
    assert not torch.equal(given, moment)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": Order.DESCENDING}, "pass scales=static"),
        ({"damping": 0.0}, "pass a small positive number"),
        ({"damping": float("nan")}, "pass a small positive number"),
        ({"block": 48}, "pass a multiple of 32"),
        ({"block": 0}, "pass a multiple of 32"),
        ({"exponents": 2}, "exponents=1 or exponents=3"),
    ],
)
def test_options_that_contradict_are_refused_at_birth(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        GPTQ(**options)


def test_numbers_that_are_not_finite_are_refused() -> None:
    w, moment = weight(3, 64), correlated(64)
    w[1, 40] = float("nan")
    with pytest.raises(ModelError, match="row 1, column 40"):
        GPTQ().round(w, lambda: moment, ScaleRule.FLOOR)
    moment[2, 2] = float("inf")
    with pytest.raises(ModelError, match="calibration input was not finite"):
        GPTQ().round(weight(3, 64), lambda: moment, ScaleRule.FLOOR)


def test_a_hessian_of_another_site_is_refused() -> None:
    with pytest.raises(UsageError, match=r"pass the Hessian \[64, 64\]"):
        GPTQ().round(weight(3, 64), lambda: correlated(96), ScaleRule.FLOOR)


def test_a_backend_that_there_is_not_is_refused() -> None:
    moment = correlated(64)
    with pytest.raises(UsageError, match="eager, numba, triton"):
        GPTQ().round(weight(3, 64), lambda: moment, ScaleRule.FLOOR, backend="fast")
    with pytest.raises(UsageError, match="eager, numba, triton"):
        GPTQ().compensated(weight(3, 64), moment, ScaleRule.FLOOR, backend="fast")


def test_which_inputs_it_wants() -> None:
    assert ROUNDINGS["gptq"] is GPTQ
    assert GPTQ(inputs=Inputs.ROUNDED).sees_rounded_inputs
    assert not GPTQ().sees_rounded_inputs
    assert not RTN().sees_rounded_inputs
