"""PeRQ ("perq"): blocks of equal mass, and what that is good for."""

import math
from types import MappingProxyType

import pytest
import torch

import oracles
from mxtorq.errors import UsageError
from mxtorq.models.family import SiteName
from mxtorq.transforms import METHODS
from mxtorq.transforms.base import NetworkShape, SiteStatistics
from mxtorq.transforms.chain import Chain
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.permutation import Permutation
from mxtorq.transforms.perq import PeRQ, balanced_order

EPS = torch.finfo(torch.float64).eps
WIDTH = 256


def slow_order(mass: torch.Tensor, block: int) -> list[int]:
    """Each channel, heaviest first, to the lightest block that has room; all blocks looked at."""
    count = len(mass) // block
    blocks: list[list[int]] = [[] for _ in range(count)]
    for channel in sorted(range(len(mass)), key=lambda c: -mass[c].item()):
        room = [at for at in range(count) if len(blocks[at]) < block]
        lightest = min(room, key=lambda at: sum(mass[c].item() for c in blocks[at]))
        blocks[lightest].append(channel)
    return [channel for members in blocks for channel in members]


@pytest.fixture(scope="module")
def clustered() -> SiteStatistics:
    """All outlier channels side by side in one block."""
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(300, WIDTH, generator=draw)
    rows[:, 40:52] *= 20
    return oracles.site(rows, torch.randn(8, WIDTH, generator=draw))


def block_mass(rows: torch.Tensor, block: int = 32) -> torch.Tensor:
    """The l1 norm of each token's blocks."""
    return rows.double().abs().unflatten(-1, (-1, block)).sum(-1)


def test_by_hand() -> None:
    """10 to block 0; 6 and 5 to block 1; 4 to block 0 (10 < 11); 3 to block 1 (11 < 14), full;
    the rest to block 0: {10, 4, 1} and {6, 5, 3}."""
    mass = torch.tensor([4.0, 10.0, 5.0, 1.0, 6.0, 3.0])
    assert balanced_order(mass, 3).tolist() == [1, 0, 3, 4, 2, 5]


@pytest.mark.parametrize(("width", "block"), [(256, 32), (96, 32), (64, 2), (64, 64), (60, 5)])
@pytest.mark.parametrize("power", [0.2, 1, 5, 40])
def test_capacity_balance_and_the_slow_version(width: int, block: int, power: float) -> None:
    """Whole blocks, masses within the largest channel of each other, ties to the lower block.

    Masses are multiples of 2^-20 below 1: sums of them are exact in any order.
    """
    draw = torch.Generator().manual_seed(width)
    mass = (torch.rand(width, dtype=torch.float64, generator=draw) ** power * 2**20).round() / 2**20
    order = balanced_order(mass, block)
    assert sorted(order.tolist()) == list(range(width))
    assert order.tolist() == slow_order(mass, block)
    sums = mass[order].reshape(-1, block).sum(1)
    assert (sums.max() - sums.min()).item() <= mass.max().item()


def test_a_heavy_channel_fills_up_last() -> None:
    """One channel outweighs everything: its block waits until the others are full."""
    mass = torch.ones(12, dtype=torch.float64)
    mass[7] = 100
    order = balanced_order(mass, 4)
    assert order[0] == 7
    sums = mass[order].reshape(-1, 4).sum(1)
    assert sums.tolist() == [103, 4, 4]


def test_the_worst_block_gets_lighter(clustered: SiteStatistics) -> None:
    """Before, one block holds 12 outliers of 20; after, each of 8 holds one or two of them."""
    permuted = PeRQ(rotate=False).fit(clustered, 0)
    assert isinstance(permuted, Permutation)
    before, after = block_mass(clustered.sample), block_mass(permuted.apply(clustered.sample))
    assert after.mean(0).max() < before.mean(0).max() / 3
    assert after.amax() < before.amax() / 2
    expected = clustered.sample.double().abs().mean(0)
    spread = after.mean(0).max() - after.mean(0).min()
    assert spread <= expected.max() + WIDTH * EPS * expected.sum()


def test_the_mass_bounds_what_the_rotation_leaves(clustered: SiteStatistics) -> None:
    """No entry of a rotated block exceeds its l1 norm / sqrt(32), and the bound is reached."""
    fitted = PeRQ().fit(clustered, 0)
    assert isinstance(fitted, Chain)
    permuted = fitted.links[0].apply(clustered.sample.double())
    rotated = fitted.apply(clustered.sample.double()).unflatten(-1, (-1, 32))
    bound = block_mass(permuted) / math.sqrt(32)
    assert (rotated.abs().amax(-1) <= bound * (1 + 64 * EPS)).all()
    row = sylvester(32)[5]
    reached = (row.sign() @ sylvester(32)).abs().max()
    assert abs(reached.item() - 32 / math.sqrt(32)) <= 64 * EPS * math.sqrt(32)


def test_it_is_permutation_then_hadamard(clustered: SiteStatistics) -> None:
    """Orthogonal, so that products are kept: d terms a sum, on both sides."""
    fitted = METHODS["perq"]().fit(clustered, 0)
    assert isinstance(fitted, Chain)
    assert [link.kind for link in fitted.links] == ["permutation", "block-rotation"]
    assert fitted.multiply_adds == 32 * WIDTH
    x, w = clustered.sample.double(), clustered.weight
    bound = 4 * WIDTH * EPS * x.norm(dim=1)[:, None] * w.norm(dim=1)
    assert ((fitted.apply(x) @ fitted.fuse(w).T - x @ w.T).abs() <= bound).all()


@pytest.mark.parametrize("size", [0, 1, 24, 96])
def test_sizes_that_cannot_be_are_refused_at_birth(size: int) -> None:
    with pytest.raises(UsageError):
        PeRQ(size=size)


def test_widths_that_blocks_do_not_fill_are_refused(clustered: SiteStatistics) -> None:
    sites = MappingProxyType({SiteName.QKV_IN: 128, SiteName.DOWN_IN: 352})
    shape = NetworkShape(hidden=128, heads=2, kv_heads=2, head_dim=64, layers=1, sites=sites)
    with pytest.raises(UsageError, match=r"down_in has 352(.|\n)*size=32"):
        PeRQ(size=64).check(shape)
    PeRQ().check(shape)
    with pytest.raises(UsageError, match="whole blocks"):
        PeRQ(size=512).fit(clustered, 0)
