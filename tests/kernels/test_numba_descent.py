"""Descent compiled by numba has the bits of the eager version, in groups and in whole weights."""

from collections.abc import Iterator

import pytest
import torch

import oracles
from mxtorq.formats import e2m1
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import NonOCPScale, Scale
from mxtorq.rounding.descent import move_group_
from mxtorq.rounding.gptq import GPTQ
from mxtorq.rounding.search import Search

pytest.importorskip("numba")

BACKENDS = ("eager", "numba")


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def group(kind: str, rows: int) -> list[torch.Tensor]:
    """Values, slopes, codes, scales and pulls of 32 columns."""
    draw = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (32, rows), generator=draw, dtype=torch.uint8)
    scale = torch.exp2(torch.randint(-9, -3, (rows,), generator=draw).float())
    slopes = torch.randn(32, rows, generator=draw)
    pull = 0.4 * torch.randn(32, 32, generator=draw)
    if kind == "ties":  # slopes and pulls that keep multiples on cuts
        slopes = torch.randint(-14, 15, (32, rows), generator=draw) / 4
        pull = torch.randint(-1, 2, (32, 32), generator=draw).float()
    elif kind == "subnormal":
        scale = torch.full((rows,), 2.0**-127)
    elif kind == "huge":
        scale = torch.full((rows,), 2.0**125)
    elif kind == "odd":
        scale *= 4 / 3
    elif kind == "zeros":
        slopes[:, ::2] = 0.0
    slopes = slopes * (scale if kind != "broken" else 1)
    if kind == "broken":
        slopes[3, ::5], slopes[4, 1::5] = torch.nan, torch.inf
    return [e2m1.decode(codes) * scale, slopes, codes, scale, pull]


@pytest.mark.parametrize(
    "kind", ["gaussian", "ties", "subnormal", "huge", "odd", "zeros", "broken"]
)
@pytest.mark.usefixtures("threads")
def test_a_group_moves_to_the_same_bits(kind: str) -> None:
    """Rows that fill tiles and rows that do not, over one thread and two."""
    for rows in (5, 64, 1031):
        given, found = group(kind, rows), []
        for backend in BACKENDS:
            mine = [part.clone() for part in given]
            found.append([move_group_(*mine, backend), *mine])
        for one, other in zip(*found, strict=True):
            bits = [
                part.nan_to_num(7.0).view(torch.int32) if part.is_floating_point() else part
                for part in (one, other)
            ]
            assert torch.equal(*bits)
        assert bool(found[0][0].any())
        assert not torch.equal(found[0][3], given[2])


@pytest.mark.parametrize("scale", [ScaleRule.FLOOR, *NonOCPScale])
def test_whole_weights_have_the_same_bits(scale: Scale) -> None:
    draw = torch.Generator().manual_seed(3)
    weight = 0.02 * torch.randn(301, 192, generator=draw)
    weight[7], weight[8] = 0.0, 2.0**-140 * weight[9]
    moment = oracles.spd(192, 1e4, seed=4)
    wide = {"exponents": 3, "search": Search.OUTPUTS} if scale is ScaleRule.FLOOR else {}
    start = GPTQ(**wide).round(weight, lambda: moment, scale)
    one, other = (
        GPTQ(sweeps=2, **wide).round(weight, lambda: moment, scale, backend=by) for by in BACKENDS
    )
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert not torch.equal(one.packed, start.packed)
