"""RTN is the format's own rounding and never pays for a Hessian."""

import torch

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import quantize
from mxtorq.rounding import ROUNDINGS


def test_rtn_is_quantize_and_leaves_the_hessian_alone() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    def hessian() -> torch.Tensor:
        raise AssertionError("RTN asked for a Hessian")

    for rule in ScaleRule:
        found = ROUNDINGS["rtn"](weight, hessian, rule)
        expected = quantize(weight, rule)
        assert torch.equal(found.packed, expected.packed)
        assert torch.equal(found.e8m0, expected.e8m0)
