"""TORQ as a method: both levels do on data what the paper says they do."""

import pytest
import torch

import oracles
from mxtorq.errors import FormatError, UsageError
from mxtorq.formats.mxfp4 import fake_quantize
from mxtorq.transforms.base import SiteStatistics
from mxtorq.transforms.torq.inter_block import GivensChain
from mxtorq.transforms.torq.method import TORQ, InterAngle, Levels
from mxtorq.transforms.torq.rotation import TwoLevelRotation


@pytest.fixture(scope="module")
def uneven() -> SiteStatistics:
    return oracles.site(oracles.activations(1024, 256, outliers=5, seed=9))


def block_variance(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().unflatten(-1, (-1, 32)).square().mean(dim=(0, 2))


@pytest.mark.parametrize("levels", list(Levels))
def test_block_variances_are_equal_whenever_the_inter_level_is_on(
    uneven: SiteStatistics, levels: Levels
) -> None:
    """R_intra is orthogonal inside a block, so it leaves the variances where R_inter put them."""
    transform = TORQ(levels=levels).fit(uneven, seed=0)
    after = block_variance(transform.apply(uneven.sample.double()))
    spread = (after.max() / after.mean()).item()
    if levels is Levels.INTRA:
        assert spread > 2
    else:
        assert spread <= 1 + 1e-11  # 1e-12 of Sigma, and the rounding of 1024 rows


def test_the_mean_angle_option(uneven: SiteStatistics) -> None:
    transform = TORQ(levels=Levels.INTER, angle=InterAngle.MEAN).fit(uneven, seed=0)
    after = block_variance(transform.apply(uneven.sample.double()))
    assert (after.max() / after.mean()).item() <= 1 + 2e-6


def test_levels_are_the_ablation(uneven: SiteStatistics) -> None:
    both, inter, intra = (TORQ(levels=level).fit(uneven, seed=0) for level in Levels)
    assert inter.intra is None
    assert both.intra is not None
    assert len(intra.inter) == 0
    assert torch.equal(both.inter.sin, inter.inter.sin)
    assert inter.multiply_adds == 4 * 32 * len(inter.inter)
    assert both.multiply_adds == inter.multiply_adds + intra.multiply_adds


def test_the_kronecker_order(uneven: SiteStatistics) -> None:
    """x (R_inter (x) R_intra) with row-major blocks: the order that the paper prints transposed."""
    transform = TORQ().fit(uneven, seed=0)
    assert transform.intra is not None
    inter, intra = transform.inter.matrix(8).contiguous(), transform.intra.contiguous()
    dense = torch.kron(inter, intra)
    assert (transform.matrix() - dense).abs().max() <= 1e-13
    swapped = torch.kron(intra, inter)
    assert (transform.matrix() - swapped).abs().max() > 0.1


def test_seed_decides_the_sample(uneven: SiteStatistics) -> None:
    few = TORQ(blocks=500)
    assert torch.equal(few.fit(uneven, seed=1).intra, few.fit(uneven, seed=1).intra)
    assert not torch.equal(few.fit(uneven, seed=1).intra, few.fit(uneven, seed=2).intra)


def test_it_lowers_the_error_of_activations_with_outliers(uneven: SiteStatistics) -> None:
    rotated = TORQ().fit(uneven, seed=0).apply(uneven.sample)

    def error(x: torch.Tensor) -> float:
        return ((fake_quantize(x) - x).square().sum() / x.square().sum()).item()

    assert error(rotated) < error(uneven.sample)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"pairs": 0}, {"top": 1}, {"top": 33}])
def test_options_are_checked_at_birth(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        TORQ(**wrong)


def test_a_chain_that_reaches_beyond_the_width_is_refused() -> None:
    chain = GivensChain(
        torch.tensor([0]),
        torch.tensor([4]),
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
    )
    with pytest.raises(FormatError, match="reach block 4"):
        TwoLevelRotation(128, chain, None)
