"""GPTQ compiled by numba has the bits of the eager version, in groups and in whole weights."""

from collections.abc import Iterator

import pytest
import torch

import oracles
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import NonOCPScale, Scale, block_scales
from mxtorq.rounding.gptq import GPTQ, GroupScales, Order
from mxtorq.rounding.group import fix_group_
from mxtorq.rounding.rtn import RTN

pytest.importorskip("numba")

WAYS = [
    (Order.FORWARD, GroupScales.DYNAMIC),
    (Order.BACKWARD, GroupScales.DYNAMIC),
    (Order.BACKWARD, GroupScales.STATIC),
    (Order.DESCENDING, GroupScales.STATIC),
]
BACKENDS = ("eager", "numba")
KINDS = ["gaussian", "ties", "subnormal", "huge", "zeros", "broken"]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def group(kind: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A group's columns, and how much of an error is taken from the others."""
    draw = torch.Generator().manual_seed(rows)
    columns = torch.randn(32, rows, generator=draw)
    follow = 0.4 * torch.randn(32, 32, generator=draw)
    if kind == "ties":  # and errors that are multiples of a quarter, so that ties stay
        columns = torch.randint(-28, 29, (32, rows), generator=draw) / 4
        follow = torch.randint(-1, 2, (32, 32), generator=draw).float()
    elif kind == "subnormal":
        columns *= torch.exp2(torch.randint(-149, -120, (rows,), generator=draw).float())
    elif kind == "huge":
        columns *= 2.0**110
    elif kind == "zeros":
        columns[torch.rand(32, rows, generator=draw) < 0.8] = 0.0
        columns[:, ::3] = 0.0
        columns[:, 1::3] *= -1.0
    elif kind == "broken":
        columns[:, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        columns[5, 3::7] = torch.inf
    return columns, follow.triu()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Signed zeros too."""
    if one.dtype == torch.float32:
        one, other = one.view(torch.int32), other.view(torch.int32)
    return torch.equal(one, other)


@pytest.mark.parametrize("rule", [*ScaleRule, None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("threads")
def test_a_group_is_fixed_to_the_same_bits(kind: str, rule: ScaleRule | None) -> None:
    """Rows that fill tiles and rows that do not, over one thread and two."""
    for rows in (5, 64, 1031):
        columns, follow = group(kind, rows)
        scales = torch.full((3, rows), 0.37)
        groups = [1] * 32 if rule else [j % 3 for j in range(32)]
        if rule is None:
            scales[1] = block_scales(columns.T.contiguous(), NonOCPScale.FOUR_THIRDS)
        found = []
        for backend in BACKENDS:
            mine = columns.clone(), scales.clone()
            codes = fix_group_(mine[0], follow, mine[1], groups, rule, backend)
            found.append((codes, *mine))
        # A NaN has no code, and the sign of one that is computed is the processor's business.
        whole = found[0][1].isfinite().all(0)
        assert bool(whole.all()) == (kind != "broken")
        pairs = zip(*found, strict=True)
        assert all(same_bits(one[:, whole], other[:, whole]) for one, other in pairs)
        assert torch.equal(found[1][1].isfinite().all(0), whole)
        assert not torch.equal(found[0][1], columns)


@pytest.mark.parametrize(
    ("scale", "exponents"),
    [(ScaleRule.FLOOR, 1), (ScaleRule.UOS, 1), (ScaleRule.RCEIL, 3)]
    + [(scale, 1) for scale in NonOCPScale],
)
@pytest.mark.parametrize(("order", "scales"), WAYS)
def test_whole_weights_have_the_same_bits(
    order: Order, scales: GroupScales, scale: Scale, exponents: int
) -> None:
    """With rows that end worse than plain ones, which each backend has to notice."""
    draw = torch.Generator().manual_seed(3)
    spread = torch.exp2(2 * torch.randn(1, 192, generator=draw))
    weight = 0.02 * spread * torch.randn(301, 192, generator=draw)
    weight[7], weight[8] = 0.0, 2.0**-140 * weight[9]
    moment = oracles.spd(192, 1e6, seed=4)
    rounding = GPTQ(order=order, scales=scales, exponents=exponents, damping=0.3)
    alone = [rounding.compensated(weight, moment, scale, backend=by) for by in BACKENDS]
    whole = [rounding.round(weight, lambda: moment, scale, backend=by) for by in BACKENDS]
    for one, other in (*zip(*alone, strict=True), *zip(*whole, strict=True)):
        assert torch.equal(one, other)
    mine, plain = (
        each.round(weight, lambda: moment, scale).packed
        for each in (rounding, RTN(exponents=exponents))
    )
    assert 0 < int((mine == plain).all(1).sum()) < len(weight)
