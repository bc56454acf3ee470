"""A few tokens times a packed weight."""

import pytest
import torch

from mxtorq.formats.mxfp4 import MXFP4, dequantize, fake_quantize, quantize

pytest.importorskip("numba", reason="the extra numba is not installed")

from mxtorq.kernels.dispatch import multiplies_packed, multiply_packed
from mxtorq.kernels.numba.matmul import LIMIT

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("tokens", [1, 2, 5, LIMIT])
def test_sums_that_fit_float32_are_exact(tokens: int) -> None:
    """Scales from 2^-2 to 2^2 and operands with one fraction bit: all partial sums are whole
    multiples of 2^-6 below 2^17, so no order of summation rounds."""
    draw = torch.Generator().manual_seed(tokens)
    packed = torch.randint(0, 256, (19, 64), generator=draw, dtype=torch.uint8)
    scales = torch.randint(125, 130, (19, 4), generator=draw, dtype=torch.uint8)
    weight = MXFP4(packed, scales)
    x = torch.randint(-12, 13, (tokens, 128), generator=draw) / 2
    bias = torch.randint(-8, 9, (19,), generator=draw) / 4
    found = multiply_packed(x, weight, bias)
    assert torch.equal(found.double(), x.double() @ dequantize(weight).double().T + bias)


def test_other_sums_are_within_their_bound() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(33, 256, generator=draw))
    x = fake_quantize(torch.randn(3, 7, 256, generator=draw))
    found = multiply_packed(x, weight)
    assert found.shape == (3, 7, 33)
    w = dequantize(weight).double()
    bound = 256 * EPS * (x.double().abs() @ w.abs().T)
    assert ((found - x.double() @ w.T).abs() <= bound).all()


def test_nan_scales_stay_nan() -> None:
    weight = MXFP4(torch.zeros(2, 16).byte(), torch.tensor([[255], [127]]).byte())
    found = multiply_packed(torch.ones(1, 32), weight)
    assert found.isnan().tolist() == [[True, False]]


def test_when_it_is_used() -> None:
    assert multiplies_packed(torch.ones(LIMIT, 32))
    assert not multiplies_packed(torch.ones(LIMIT + 1, 32))
    assert not multiplies_packed(torch.ones(1, 32).bfloat16())
    assert not multiplies_packed(torch.ones(1, 32, requires_grad=True))
