"""Hadamard matrices in exact integers, their products for the widths of real models, the method."""

import itertools
import math

import pytest
import torch

import oracles
from mxtorq.errors import UsageError
from mxtorq.models.family import SiteName
from mxtorq.transforms.base import NetworkShape
from mxtorq.transforms.hadamard import Hadamard, factors, paley, sizes, sylvester
from mxtorq.transforms.quarot import full_hadamard

PALEY = [4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60, 68, 72, 76, 80, 84, 104, 108, 124, 148, 200, 480]

FAMILY_WIDTHS = {
    "Llama-3.2-1B": (2048, 8192, 64),
    "Llama-3.2-3B": (3072, 8192, 128),
    "Llama-3-8B": (4096, 14336, 128),
    "Llama-3-70B": (8192, 28672, 128),
    "Llama-3.1-405B": (16384, 53248, 128),
    "Llama-2-13B": (5120, 13824, 128),
    "Qwen3-0.6B": (1024, 3072, 128),
    "Qwen3-1.7B": (2048, 6144, 128),
    "Qwen3-4B": (2560, 9728, 128),
    "Qwen3-8B": (4096, 12288, 128),
    "Qwen3-14B": (5120, 17408, 128),
    "Qwen3-32B": (5120, 25600, 128),
}
"""Hidden size, input of down_proj, and head."""


def assert_hadamard(matrix: torch.Tensor) -> None:
    """Entries 1 and -1 and H H^T = n I, in integers, after undoing the normalisation."""
    n = len(matrix)
    scaled = matrix * math.sqrt(n)
    entries = scaled.round().to(torch.int64)
    assert (scaled - entries).abs().max() <= 4 * torch.finfo(torch.float64).eps
    assert (entries.abs() == 1).all()
    assert torch.equal(entries @ entries.T, n * torch.eye(n, dtype=torch.int64))


@pytest.mark.parametrize("size", PALEY)
def test_paley_matrices_are_hadamard(size: int) -> None:
    assert_hadamard(paley(size))


@pytest.mark.parametrize("size", [1, 2, 4, 32, 256])
def test_sylvester_matrices_are_hadamard(size: int) -> None:
    assert_hadamard(sylvester(size))


def test_sizes_that_paley_does_not_reach_are_refused() -> None:
    for size in (1, 2, 6, 16, 40, 52, 92, 172):  # 15, 39, 51 are no primes; 25 is only a power
        with pytest.raises(UsageError, match="Paley"):
            paley(size)
    with pytest.raises(UsageError, match="power of two"):
        sylvester(12)


@pytest.mark.parametrize("model", FAMILY_WIDTHS)
def test_all_widths_of_the_families_have_factors(model: str) -> None:
    for width in FAMILY_WIDTHS[model]:
        parts = factors(width)
        assert math.prod(map(len, parts)) == width
        assert 3 * full_hadamard(width).multiply_adds <= width**2  # far below a dense one
        for part in parts:
            assert_hadamard(part)


def test_some_factorisations() -> None:
    expected = {
        1: (), 2: (2,), 64: (8, 8), 128: (8, 16), 4096: (16, 16, 16), 768: (12, 8, 8),
        352: (44, 8), 9728: (76, 8, 16), 14336: (28, 16, 32), 17408: (68, 16, 16),
        25600: (20, 20, 8, 8), 13824: (12, 12, 12, 8), 53248: (104, 16, 32),
    }  # fmt: skip
    assert {width: sizes(width) for width in expected} == expected


def test_no_cheaper_paley_sizes_exist() -> None:
    """Against every multiset of Paley sizes, the rest of the width split as `sizes` does it."""
    for width in (96, 768, 1152, 2304, 13824, 25600, 14400):
        costs = [
            sum(chosen) + sum(sizes(width // math.prod(chosen)))
            for count in (0, 1, 2, 3)
            for chosen in itertools.combinations_with_replacement(PALEY, count)
            if width % math.prod(chosen) == 0
            and (width // math.prod(chosen)).bit_count() == 1
            and all(size & (size - 1) for size in chosen)
        ]
        assert sum(sizes(width)) <= min(costs)


def test_the_product_is_a_hadamard_matrix() -> None:
    assert_hadamard(full_hadamard(96).matrix())
    assert_hadamard(full_hadamard(240, torch.Generator().manual_seed(0)).matrix())


@pytest.mark.parametrize("width", [11008, 172, 33, 6, 0, -4])
def test_widths_without_a_product_name_what_works(width: int) -> None:
    with pytest.raises(UsageError) as caught:
        factors(width)
    assert "`brq`" in caught.value.todo
    assert "`hadamard`" in caught.value.todo


def shape(**sites: int) -> NetworkShape:
    widths = {SiteName(name): width for name, width in sites.items()}
    return NetworkShape(64, 4, 2, 16, 2, widths)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_the_method_repeats_one_sylvester_block(size: int) -> None:
    site = oracles.site(torch.ones(1, 256), torch.ones(1, 256))
    dense = Hadamard(size=size).fit(site, seed=0).matrix()
    assert torch.equal(dense, torch.block_diag(*[sylvester(size)] * (256 // size)))


def test_the_method_refuses_widths_that_its_blocks_do_not_divide() -> None:
    assert Hadamard() == Hadamard(size=32)
    Hadamard(size=64).check(shape(qkv_in=64, down_in=192))
    with pytest.raises(UsageError, match="down_in has 96 features") as caught:
        Hadamard(size=64).check(shape(qkv_in=64, down_in=96))
    assert caught.value.todo == "choose size=32"
    with pytest.raises(UsageError, match="no smaller block fits"):
        Hadamard(size=64).check(shape(down_in=33))
    for size in (0, 1, 24, -32):
        with pytest.raises(UsageError, match="powers of two"):
            Hadamard(size=size)
