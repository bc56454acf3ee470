"""RTN is the format's own rounding, never pays for a Hessian, and loses nothing by searching."""

import pytest
import torch

from mxtorq.errors import FormatError, ModelError, UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import NonOCPScale, Scale
from mxtorq.kernels.dispatch import dequantize, quantize
from mxtorq.rounding import ROUNDINGS
from mxtorq.rounding.rtn import RTN

SCALES: list[Scale] = [*ScaleRule, *NonOCPScale]


def weight(rows: int = 5, width: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def no_hessian() -> torch.Tensor:
    raise AssertionError("RTN asked for a Hessian")


@pytest.mark.parametrize("scale", SCALES)
def test_it_is_quantize_and_leaves_the_hessian_alone(scale: Scale) -> None:
    found = ROUNDINGS["rtn"]().round(weight(), no_hessian, scale)
    expected = quantize(weight(), scale)
    assert type(found) is type(expected)
    assert all(torch.equal(*parts) for parts in zip(found, expected, strict=True))


@pytest.mark.parametrize("rule", ScaleRule)
def test_three_exponents_lower_the_error_of_some_blocks_and_raise_none(rule: ScaleRule) -> None:
    w = weight(64)
    one, three = (
        (dequantize(RTN(exponents=count).round(w, no_hessian, rule)).double() - w)
        .square()
        .unflatten(1, (-1, 32))
        .sum(-1)
        for count in (1, 3)
    )
    # Both sums have 32 terms, each off by its rounding.
    assert (three <= one * (1 + 64 * torch.finfo(torch.float64).eps)).all()
    assert (three < one).any()


def test_codes_are_nearest_under_the_scales_that_were_found() -> None:
    w = weight()
    found = RTN(exponents=3).round(w, no_hessian, ScaleRule.FLOOR)
    scales = 2.0 ** (found[1].double() - 127)
    values = dequantize(found).double()
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    grid = torch.cat((-magnitudes, magnitudes)) * scales.repeat_interleave(32, 1)[..., None]
    nearest = (grid - w.double()[..., None]).abs().amin(-1)
    assert torch.equal((values - w).abs(), nearest)


@pytest.mark.parametrize("scale", NonOCPScale)
def test_a_search_over_scales_without_exponents_is_refused(scale: NonOCPScale) -> None:
    for refuse in (RTN(exponents=3).check, lambda s: RTN(exponents=3).round(weight(), list, s)):
        with pytest.raises(UsageError, match=rf"{scale}(.|\n)*pass exponents=1, or one of .*floor"):
            refuse(scale)
    RTN().check(scale)


@pytest.mark.parametrize("exponents", [0, 2, 5])
def test_other_numbers_of_exponents_are_refused(exponents: int) -> None:
    with pytest.raises(UsageError, match="exponents=1 or exponents=3"):
        RTN(exponents=exponents)


@pytest.mark.parametrize("exponents", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_no_code_stands_for_is_refused(exponents: int, bad: float) -> None:
    w = weight()
    w[3, 70] = bad
    with pytest.raises(ModelError, match="row 3, column 70"):
        RTN(exponents=exponents).round(w, no_hessian, ScaleRule.FLOOR)


@pytest.mark.parametrize("exponents", [1, 3])
def test_a_width_of_broken_blocks_is_refused(exponents: int) -> None:
    with pytest.raises(FormatError, match="multiple of 32"):
        RTN(exponents=exponents).round(weight(2, 48), no_hessian, ScaleRule.FLOOR)


@pytest.mark.parametrize("exponents", [1, 3])
def test_every_backend_has_the_same_bits(exponents: int) -> None:
    rounding, w = RTN(exponents=exponents), weight(700, 640)
    eager = rounding.round(w, no_hessian, ScaleRule.EVEN, backend="eager")
    fastest = rounding.round(w, no_hessian, ScaleRule.EVEN)
    assert all(torch.equal(*parts) for parts in zip(eager, fastest, strict=True))
    with pytest.raises(UsageError, match="eager, numba, triton"):
        rounding.round(w, no_hessian, ScaleRule.EVEN, backend="fast")
