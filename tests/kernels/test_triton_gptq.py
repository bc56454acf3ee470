"""A group of GPTQ columns in one kernel has the bits of the same lines in eager torch."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from mxtorq.errors import UsageError
from mxtorq.formats import e2m1
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import NonOCPScale, block_scales
from mxtorq.kernels.triton.gptq import round_group_
from triton_device import DEVICE, same

pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow) .* encountered:RuntimeWarning")


def slow(columns: torch.Tensor, follow: torch.Tensor, scales: torch.Tensor):
    """Multiples and errors; every quotient, product and difference is a tensor of its own."""
    free, errors = columns.clone(), torch.empty_like(columns)
    for j in range(32):
        multiple = free[j] / scales
        rounded = e2m1.nearest(multiple) * scales
        errors[j] = free[j] - rounded
        free[j] = multiple
        for k in range(j + 1, 32):
            product = follow[j, k] * errors[j]
            free[k] = free[k] - product
    return free, errors


def group(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns whose rows differ in size by everything float32 has, and a part of a larger matrix
    of compensations, its lower triangle full of what must not be used."""
    draw = torch.Generator().manual_seed(rows)
    columns = torch.randn(32, rows, generator=draw)
    columns *= torch.exp2(torch.randint(-150, 120, (rows,), generator=draw).float())
    columns[3, ::3] = -0.0
    columns[:, 5::17] = 0.0
    columns[9, 8::40] = float("nan")
    columns[9, 9::40] = float("inf")
    follow = torch.randn(96, 96, generator=draw).mul_(0.2)[32:64, 32:64]
    return columns, follow


def run(columns, follow, scales, rule):
    wide = torch.zeros(96, 96)
    wide[32:64, 32:64] = follow
    here = [columns.to(DEVICE, copy=True), wide.to(DEVICE)[32:64, 32:64]]
    room = [torch.full_like(here[0], 7.0), scales.to(DEVICE, copy=True)]
    round_group_(*here, *room, rule)
    return here[0], *room


@pytest.mark.parametrize("rule", ScaleRule)
def test_dynamic_scales(rule):
    columns, follow = group(77)
    scales = block_scales(columns.T.contiguous(), rule)
    assert scales.isnan().any()
    assert (scales == 2.0**-127).any()
    expected = (*slow(columns, follow, scales), scales)
    found = run(columns, follow, torch.zeros(77), rule)
    assert all(map(same, found, expected))


@pytest.mark.parametrize("rows", [1, 64, 77])
def test_given_scales(rows):
    """Any positive number, four thirds of the smallest power of two too."""
    columns, follow = group(rows)
    scales = block_scales(columns.T.contiguous(), NonOCPScale.FOUR_THIRDS)
    scales[::5] = torch.rand(len(scales[::5]), generator=torch.Generator().manual_seed(1)) + 0.1
    expected = (*slow(columns, follow, scales), scales)
    assert all(map(same, run(columns, follow, scales, None), expected))


def test_multiples_are_what_encode_wants():
    columns, follow = group(40)
    columns = columns.nan_to_num(0.0, 0.0, 0.0)
    multiples, errors, scales = (
        t.cpu() for t in run(columns, follow, torch.zeros(40), ScaleRule.FLOOR)
    )
    first = e2m1.decode(e2m1.encode(multiples))[0] * scales
    assert same(columns[0] - first, errors[0])


def test_refused():
    columns, follow = (tensor.to(DEVICE) for tensor in group(8))
    room = (torch.empty_like(columns), torch.ones(8, device=DEVICE))
    with pytest.raises(UsageError, match="contiguous"):
        round_group_(columns.T.contiguous().T, follow, *room)
    with pytest.raises(UsageError, match="contiguous"):
        round_group_(columns, follow.T, *room)
    empty = torch.empty(32, 0, device=DEVICE)
    round_group_(empty, follow, empty, torch.empty(0, device=DEVICE))
