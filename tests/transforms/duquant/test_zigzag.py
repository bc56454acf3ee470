"""The zigzag permutation deals channels evenly."""

import pytest
import torch

from mxtorq.transforms.duquant.zigzag import zigzag_order


def dealt(magnitudes: torch.Tensor, block: int) -> list[list[int]]:
    """Cards in turn, one by one, back and forth."""
    count = len(magnitudes) // block
    hands: list[list[int]] = [[] for _ in range(count)]
    ranked = sorted(range(len(magnitudes)), key=lambda c: -magnitudes[c].item())
    at, step = 0, 1
    for channel in ranked:
        hands[at].append(channel)
        if not 0 <= at + step < count:
            step = -step
        else:
            at += step
    return hands


def test_by_hand() -> None:
    """Magnitudes 8 ... 1 in two blocks: 8, 5, 4, 1 and 7, 6, 3, 2, sums 18 and 18."""
    magnitudes = torch.tensor([3.0, 8.0, 1.0, 6.0, 5.0, 2.0, 7.0, 4.0])
    order = zigzag_order(magnitudes, 4)
    assert magnitudes[order].tolist() == [8, 5, 4, 1, 7, 6, 3, 2]
    assert order.tolist() == [1, 4, 7, 2, 6, 3, 0, 5]


@pytest.mark.parametrize(("width", "block"), [(160, 32), (96, 32), (512, 128), (30, 3), (32, 32)])
def test_it_is_the_deal(width: int, block: int) -> None:
    draw = torch.Generator().manual_seed(width)
    magnitudes = torch.rand(width, generator=draw).round(decimals=1)  # with ties
    order = zigzag_order(magnitudes, block)
    assert sorted(order.tolist()) == list(range(width))
    assert order.reshape(-1, block).tolist() == dealt(magnitudes, block)


@pytest.mark.parametrize(("width", "block"), [(1024, 32), (512, 128), (160, 32), (30, 3), (21, 3)])
@pytest.mark.parametrize("power", [0.5, 1, 4, 16])
def test_block_sums_are_close(width: int, block: int, power: float) -> None:
    """Both bounds of the docstring, in float64 with room for the rounding of a sum."""
    draw = torch.Generator().manual_seed(width + block)
    magnitudes = torch.rand(width, dtype=torch.float64, generator=draw) ** power
    sums = magnitudes[zigzag_order(magnitudes, block)].reshape(-1, block).sum(1)
    spread = (sums.max() - sums.min()).item()
    ranked = magnitudes.sort().values
    rounding = block**2 * torch.finfo(torch.float64).eps
    assert spread <= (ranked[-1] - ranked[0]).item() + rounding
    neighbours = ranked.diff().max().item()
    pairs = -(-block // 2)
    assert spread <= pairs * (len(sums) - 1) * neighbours + rounding


def test_within_a_block_magnitudes_fall() -> None:
    magnitudes = torch.rand(512, generator=torch.Generator().manual_seed(1))
    blocks = magnitudes[zigzag_order(magnitudes, 128)].reshape(-1, 128)
    assert (blocks.diff(dim=1) <= 0).all()
