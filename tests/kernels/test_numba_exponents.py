"""The search over three exponents compiled by numba has the bits of the eager version."""

import pytest
import torch

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.rounding.exponents import search_exponents

pytest.importorskip("numba")


def blocks(kind: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    if kind == "bits":  # every kind of float32, most blocks broken by a NaN or an Inf
        bits = torch.randint(-(2**31), 2**31 - 1, (5000, 32), generator=draw)
        return bits.to(torch.int32).view(torch.float32)
    if kind == "finite bits":
        return blocks("bits").nan_to_num(1.0, 2.0, -3.0)
    power = torch.exp2(torch.randint(-149, 124, (5000, 1), generator=draw).float())
    if kind == "integers":  # ties between scales
        return power * torch.randint(-12, 13, (5000, 32), generator=draw)
    return power * torch.randn(5000, 32, generator=draw)


@pytest.mark.parametrize("rule", ScaleRule)
@pytest.mark.parametrize("kind", ["bits", "finite bits", "integers", "gaussian"])
def test_every_scale_has_the_same_bits(kind: str, rule: ScaleRule) -> None:
    values = blocks(kind)
    for rows in (values, values[:1], values[:, :].T.contiguous().T):
        eager, numba = (search_exponents(rows, rule, backend=by) for by in ("eager", "numba"))
        assert torch.equal(eager.view(torch.int32), numba.view(torch.int32))
