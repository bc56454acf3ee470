"""Smoothing factors, and SmoothQuant ("smoothquant") as a method."""

from dataclasses import replace

import pytest
import torch

import oracles
from mxtorq.errors import UsageError
from mxtorq.models.family import SiteName
from mxtorq.transforms import METHODS
from mxtorq.transforms.base import SiteStatistics
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.rotation import Identity
from mxtorq.transforms.smoothing import Reader, smoothing, smoothing_factors
from mxtorq.transforms.smoothquant import Sites, SmoothQuant

EPS = torch.finfo(torch.float64).eps
WIDTH = 64


def site(name: SiteName, outs: tuple[int, ...]) -> SiteStatistics:
    rows = oracles.activations(50, WIDTH, outliers=3, seed=2)
    draw = torch.Generator().manual_seed(5)
    weights = (0.1 * torch.randn(out, WIDTH, generator=draw) for out in outs)
    return oracles.site(rows, *weights, name=name)


SITES = {
    SiteName.QKV_IN: site(SiteName.QKV_IN, (64, 32, 32)),
    SiteName.O_IN: site(SiteName.O_IN, (64,)),
    SiteName.GATE_UP_IN: site(SiteName.GATE_UP_IN, (96, 96)),
    SiteName.DOWN_IN: site(SiteName.DOWN_IN, (64,)),
}


def test_by_hand() -> None:
    """4^.5 / .25^.5 = 4; a dead channel 1e-5^.5 / 1 = .0032 is floored at .01; a dead column
    1 / 1e-5^.5; all powers exact or within a few roundings."""
    factors = smoothing_factors(
        torch.tensor([4.0, 0.0, 1.0]), torch.tensor([0.25, 1.0, 0.0]), alpha=0.5
    )
    expected = torch.tensor([4.0, 1e-2, 1e-5**-0.5], dtype=torch.float64)
    assert ((factors / expected - 1).abs() <= 8 * EPS).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_alpha_means(alpha: float) -> None:
    """1: all channels of x become equally large; 0: all columns of W; 1/2: x and W alike. Powers
    are within a few roundings, float32 inputs enter exactly."""
    statistics = SITES[SiteName.O_IN]
    transform = smoothing(statistics, alpha)
    x = transform.apply(statistics.amax.double())
    w = transform.fuse(statistics.weights[0].double()).abs().amax(0)
    ones = {0.0: w, 0.5: x / w, 1.0: x}[alpha]
    assert ((ones - 1).abs() <= 16 * EPS).all()


@pytest.mark.parametrize(
    ("name", "reader"), [(SiteName.QKV_IN, 0), (SiteName.O_IN, 0), (SiteName.GATE_UP_IN, 1)]
)
def test_the_released_reader_is_q_and_up(name: SiteName, reader: int) -> None:
    statistics = SITES[name]
    chosen = smoothing(statistics, 0.6, Reader.RELEASED)
    alone = smoothing(replace(statistics, weights=(statistics.weights[reader],)), 0.6)
    assert torch.equal(chosen.factors, alone.factors)


def test_all_readers_are_the_stacked_weight() -> None:
    statistics = SITES[SiteName.QKV_IN]
    columns = statistics.weight.abs().amax(0)
    direct = 1 / smoothing_factors(statistics.amax, columns, 0.5)
    assert torch.equal(smoothing(statistics, 0.5, Reader.ALL).factors, direct)
    assert not torch.equal(smoothing(statistics, 0.5, Reader.RELEASED).factors, direct)


def test_products_are_kept_and_outliers_shrink() -> None:
    """Each factor enters once and its inverse once: two roundings a product, d of them summed."""
    statistics = SITES[SiteName.GATE_UP_IN]
    transform = smoothing(statistics, 0.5)
    x, w = statistics.sample.double(), statistics.weight
    bound = 2 * WIDTH * EPS * (x.abs() @ w.abs().T)
    assert ((transform.apply(x) @ transform.fuse(w).T - x @ w.T).abs() <= bound).all()

    def unevenness(values: torch.Tensor) -> float:
        amax = values.abs().amax(0)
        return (amax.max() / amax.min()).item()

    assert unevenness(transform.apply(x)) < unevenness(x) / 2


def test_smoothquant_smooths_after_norms_only() -> None:
    for name, statistics in SITES.items():
        fitted = METHODS["smoothquant"]().fit(statistics, 0)
        follows_norm = name in (SiteName.QKV_IN, SiteName.GATE_UP_IN)
        assert isinstance(fitted, Diagonal if follows_norm else Identity)
        everywhere = SmoothQuant(sites=Sites.ALL).fit(statistics, 0)
        assert isinstance(everywhere, Diagonal)
        assert torch.equal(everywhere.factors, smoothing(statistics, 0.5).factors)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf")])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(UsageError, match="outside of 0 to 1"):
        SmoothQuant(alpha=alpha)


def test_the_ends_are_allowed() -> None:
    assert SmoothQuant(alpha=0.0).alpha == 0
    assert SmoothQuant(alpha=1.0).alpha == 1
