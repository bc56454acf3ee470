"""Scales of both kinds: their formulas, their ranges, and one rounding behind three functions."""

from fractions import Fraction

import pytest
import torch

from mxtorq.errors import FormatError
from mxtorq.formats import e2m1, e8m0, mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import (
    NonOCPScale,
    Scale,
    ScaledE2M1,
    assemble,
    block_scales,
    is_ocp,
)
from mxtorq.kernels.dispatch import dequantize, fake_quantize, quantize

SCALES: list[Scale] = [*ScaleRule, *NonOCPScale]
LOG256, FOUR_THIRDS = NonOCPScale.LOG256, NonOCPScale.FOUR_THIRDS


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(blocks: int, seed: int = 0) -> torch.Tensor:
    """Blocks whose sizes differ by up to 2^40."""
    draw = torch.Generator().manual_seed(seed + 1)
    return gaussian(blocks, 32, seed=seed) * torch.exp2(40 * torch.rand(blocks, 1, generator=draw))


def extremes() -> torch.Tensor:
    """A block of every size that float32 has, zeros and both ends included."""
    powers = torch.arange(-149, 128).double()
    amax = torch.cat((torch.zeros(1).double(), *(torch.exp2(powers) * f for f in (1, 1.25, 1.999))))
    block = gaussian(32).double()
    return (amax[:, None] * block / block.abs().max()).float()


def not_finite() -> torch.Tensor:
    blocks = spread(6)
    blocks[1, 3], blocks[2, 0], blocks[4, 31] = torch.nan, torch.inf, -torch.inf
    return blocks


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype and bits, signed zeros told apart; any NaN equals any NaN."""
    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[one.element_size()]
    nan = one.isnan() & other.isnan()
    return one.dtype == other.dtype and bool((nan | (one.view(bits) == other.view(bits))).all())


def test_which_scales_hardware_has() -> None:
    assert [scale for scale in SCALES if is_ocp(scale)] == list(ScaleRule)


# E8M0


@pytest.mark.parametrize("rule", ScaleRule)
def test_a_rules_scale_is_the_number_of_its_byte(rule: ScaleRule) -> None:
    blocks = torch.cat((extremes(), not_finite()))
    byte = e8m0.encode_amax(e8m0.magnitude_bits(blocks).amax(-1), rule)
    found = block_scales(blocks, rule)
    assert same(found, e8m0.decode(byte))
    numbers = byte != 255
    assert torch.equal(torch.exp2(byte[numbers].double() - 127), found[numbers].double())


# 4/3 of floor


def test_four_thirds_of_floor_rounded_once() -> None:
    blocks = extremes()
    floor = block_scales(blocks, ScaleRule.FLOOR).tolist()
    for scale, found in zip(floor, block_scales(blocks, FOUR_THIRDS).tolist(), strict=True):
        exact = Fraction(4, 3) * Fraction(scale)
        # Neighbours in float32 are 2^(e-23) apart, and 2^-149 below 2^-126. 4/3 is never a tie.
        unit = max(Fraction(scale) / 2**23, Fraction(1, 2**149))
        assert abs(Fraction(found) - exact) < unit / 2


def test_four_thirds_cuts_nothing() -> None:
    """amax/s in [3, 6), up to the rounding of 4/3: between floor's [4, 8)."""
    blocks = extremes()
    normal = blocks.abs().amax(-1) >= 2.0**-124  # below, the scale stays at its smallest
    ratio = blocks.abs().amax(-1).double() / block_scales(blocks, FOUR_THIRDS).double()
    eps = torch.finfo(torch.float32).eps
    assert (ratio < 6).all()
    assert (ratio[normal] >= 3 * (1 - eps)).all()
    assert ratio[normal].min() < 3.01
    assert ratio[normal].max() > 5.99


# 256 levels of the whole tensor


def sixths(blocks: torch.Tensor) -> torch.Tensor:
    return (blocks.abs().amax(-1).double() / 6).float()


def test_log256_has_256_even_levels() -> None:
    """Far more blocks than levels: the logarithms are multiples of one step, by the definition."""
    blocks = spread(20_000)
    levels = block_scales(blocks, LOG256).unique().double().log2()
    assert 200 < len(levels) <= 256
    low, high = sixths(blocks).double().log2().aminmax()
    index = (levels - low) / (high - low) * 255
    # Float32 rounds a level by eps / 2, which moves its logarithm by eps / 2 / ln 2, and the two
    # ends likewise; in steps of (high - low) / 255.
    bound = 2 * torch.finfo(torch.float32).eps * 255 / (high - low)
    assert (index - index.round()).abs().max() <= bound


def test_log256_is_at_most_a_step_below_a_sixth_of_the_maximum() -> None:
    blocks = spread(500)
    found, wanted = block_scales(blocks, LOG256).double(), sixths(blocks).double()
    step = torch.exp2((wanted.max().log2() - wanted.min().log2()) / 255)
    eps = torch.finfo(torch.float32).eps  # two roundings to float32 stand between the two
    assert (found <= wanted * (1 + eps)).all()
    assert (found > wanted / step * (1 - eps)).all()


def test_log256_hits_both_ends() -> None:
    """At many ranges: 255 (h - l) / (h - l) in floats is below 255 for some, and its floor 254.

    A sixth of a float32 lies at least a sixth of a unit away from a tie, so that its logarithm in
    float64 and back rounds to the same float32.
    """
    for seed in range(300):
        blocks = gaussian(40, 32, seed=seed)
        found, wanted = block_scales(blocks, LOG256), sixths(blocks)
        assert found.max() == wanted.max()
        assert found.min() == wanted.min()


def test_log256_takes_no_range_from_zeros() -> None:
    blocks = spread(50)
    expected = block_scales(blocks, LOG256)
    found = block_scales(torch.cat((torch.zeros(3, 32), blocks)), LOG256)
    assert torch.equal(found[3:], expected)
    assert torch.equal(found[:3], expected.min().expand(3))


def test_log256_keeps_equal_scales() -> None:
    block = gaussian(1, 32)
    for rows in (1, 5):
        blocks = block.repeat(rows, 1)
        assert torch.equal(block_scales(blocks, LOG256), sixths(blocks))
        blocks = torch.cat((blocks, torch.zeros(2, 32)))
        assert torch.equal(block_scales(blocks, LOG256), sixths(block).expand(rows + 2))


@pytest.mark.parametrize("scale", SCALES)
def test_zeros_stay_zeros(scale: Scale) -> None:
    zeros = torch.zeros(2, 64)
    zeros[1] = -0.0
    scales = block_scales(zeros.view(2, 2, 32), scale)
    assert bool((torch.isfinite(scales) & (scales > 0)).all())
    assert same(fake_quantize(zeros, scale), zeros)


@pytest.mark.parametrize("scale", SCALES)
def test_nan_and_inf_make_their_block_nan_and_no_other(scale: Scale) -> None:
    blocks = not_finite()
    found = block_scales(blocks, scale)
    good = torch.isfinite(blocks).all(-1)
    assert found.isnan().tolist() == (~good).tolist() == [False, True, True, False, True, False]
    assert torch.equal(found[good], block_scales(blocks[good], scale))
    assert block_scales(blocks[~good], scale).isnan().all()
    values = fake_quantize(blocks, scale)
    assert values[~good].isnan().all()
    assert same(values[good], fake_quantize(blocks[good], scale))


# One rounding


@pytest.mark.parametrize("scale", SCALES)
def test_three_functions_are_one_rounding(scale: Scale) -> None:
    for values in (gaussian(3, 5, 96), extremes(), not_finite(), spread(7).bfloat16()):
        quantized = quantize(values, scale)
        assert isinstance(quantized, MXFP4 if is_ocp(scale) else ScaledE2M1)
        assert quantized.packed.shape == (*values.shape[:-1], values.shape[-1] // 2)
        assert quantized[1].shape == (*values.shape[:-1], values.shape[-1] // 32)
        found = dequantize(quantized)
        assert found.shape == values.shape
        assert same(fake_quantize(values, scale), found.to(values.dtype))


@pytest.mark.parametrize("scale", SCALES)
def test_values_are_the_nearest_multiples_of_the_scales(scale: Scale) -> None:
    values = gaussian(4, 96)
    scales = block_scales(values.unflatten(1, (-1, 32)), scale)
    assert same(quantize(values, scale)[1], assemble_scales(scales, scale))
    multiples = values.unflatten(1, (-1, 32)).double() / scales[..., None].double()
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    best = (multiples.abs()[..., None] - magnitudes).abs().argmin(-1)
    expected = magnitudes[best].copysign(multiples).float() * scales[..., None]
    assert same(fake_quantize(values, scale), expected.flatten(1))


def assemble_scales(scales: torch.Tensor, scale: Scale) -> torch.Tensor:
    return assemble(torch.zeros(len(scales), 96, dtype=torch.uint8), scales, scale)[1]


@pytest.mark.parametrize("scale", SCALES)
def test_assemble_gives_what_quantize_gave(scale: Scale) -> None:
    """Every legal byte that a rule gives is among the extremes."""
    for values in (extremes(), gaussian(3, 96)):
        expected = quantize(values, scale)
        scales = block_scales(values.unflatten(1, (-1, 32)), scale)
        found = assemble(e2m1.unpack(expected.packed), scales, scale)
        assert type(found) is type(expected)
        assert all(same(*parts) for parts in zip(found, expected, strict=True))


@pytest.mark.parametrize("scale", SCALES)
def test_what_cannot_be_rounded_once_is_refused(scale: Scale) -> None:
    for function in (quantize, fake_quantize):
        with pytest.raises(FormatError, match="cast to float32 first"):
            function(gaussian(2, 32).double(), scale)
        with pytest.raises(FormatError, match="multiple of 32"):
            function(gaussian(2, 40), scale)
    with pytest.raises(FormatError, match="float16"):
        fake_quantize(gaussian(2, 32).half(), scale)
    assert same(mxfp4.as_blocks(gaussian(2, 32)), gaussian(2, 32))


# Published errors


@pytest.fixture(scope="module")
def errors() -> dict[Scale, torch.Tensor]:
    values = gaussian(20_000, 32, seed=4)
    return {
        scale: (fake_quantize(values, scale).double() - values).square().sum(1) for scale in SCALES
    }


@pytest.mark.parametrize(
    ("scale", "published"),
    [
        (ScaleRule.FLOOR, 0.0132),
        (ScaleRule.FLOOR6, 0.0412),
        (ScaleRule.RCEIL, 0.0134),
        (ScaleRule.UOS, 0.0125),
        (FOUR_THIRDS, 0.0139),
        (LOG256, 0.0102),
    ],
)
def test_relative_errors_on_gaussian_blocks(
    errors: dict[Scale, torch.Tensor], scale: Scale, published: float
) -> None:
    """Within three standard errors of a simulation of 200,000 values that was printed to 1e-4.

    A ratio of means over n blocks has the standard error std(e - r x) / (mean(x) sqrt(n)).
    """
    energy = gaussian(20_000, 32, seed=4).double().square().sum(1)
    relative = errors[scale].sum() / energy.sum()
    one_block = (errors[scale] - relative * energy).std() / energy.mean()
    standard_error = one_block * (1 / len(energy) + 1 / 6250) ** 0.5
    assert abs(relative - published) < 3 * standard_error + 0.5e-4


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (LOG256, ScaleRule.UOS),
        (ScaleRule.UOS, ScaleRule.FLOOR),
        (ScaleRule.FLOOR, FOUR_THIRDS),
        (FOUR_THIRDS, ScaleRule.FLOOR6),
    ],
)
def test_their_order(errors: dict[Scale, torch.Tensor], better: Scale, worse: Scale) -> None:
    """On the same blocks, by more than three standard errors of the mean difference."""
    difference = errors[worse] - errors[better]
    assert difference.mean() > 3 * difference.std() / len(difference) ** 0.5
