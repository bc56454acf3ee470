"""Rotations fused with rounding: the bits of eager float32 where the order of sums is fixed, and
of any order where every partial sum is representable."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from mxtorq.errors import FormatError, UsageError
from mxtorq.formats import mxfp4 as eager
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.kernels.triton import two_level
from mxtorq.kernels.triton.chain import prepare
from mxtorq.kernels.triton.rotate import Sums, rotate_fake_quantize, rotate_quantize
from mxtorq.kernels.triton.two_level import two_level_fake_quantize, two_level_quantize
from mxtorq.transforms.torq.inter_block import EMPTY_CHAIN, GivensChain, equalize
from oracles import spd
from triton_device import DEVICE, INTERPRETED, needs_loops, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DOTS = [
    pytest.param(
        sums,
        marks=pytest.mark.skipif(
            INTERPRETED and sums is Sums.BF16,
            reason="the interpreter multiplies the bits of bfloat16 as integers",
        ),
    )
    for sums in Sums
    if sums is not Sums.ASCENDING
]


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(32, 32, generator=draw(seed), dtype=torch.float64))[0]


def ascending(blocks: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Each block times the matrix; products and sums rounded one by one, k = 0 to 31."""
    sums = torch.zeros_like(blocks)
    for k in range(32):
        sums = sums + blocks[..., k : k + 1] * matrix[k].float()
    return sums


def chained(values: torch.Tensor, chain: GivensChain, matrix: torch.Tensor | None) -> torch.Tensor:
    """TORQ's pair in eager float32."""
    blocks = chain.apply(values.float().unflatten(-1, (-1, 32)))
    return (blocks if matrix is None else ascending(blocks, matrix)).flatten(-2)


def whole_numbers(shape: tuple[int, ...], most: int, seed: int) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=draw(seed)).float()


def equal(found, rotated: torch.Tensor, rule: ScaleRule = ScaleRule.FLOOR) -> bool:
    expected = eager.quantize(rotated, rule)
    return same(found.packed, expected.packed) and same(found.e8m0, expected.e8m0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_matrix_in_fixed_order(dtype):
    values, matrix = torch.randn(2, 35, 32, generator=draw(1)).to(dtype), orthogonal(2)
    rotated = ascending(values.float().unflatten(-1, (-1, 32)), matrix).flatten(-2)
    here = (values.to(DEVICE), matrix.to(DEVICE))
    for rule in (ScaleRule.FLOOR, ScaleRule.RCEIL):
        assert equal(rotate_quantize(*here, rule, Sums.ASCENDING), rotated, rule)
        found = rotate_fake_quantize(*here, rule, Sums.ASCENDING)
        assert same(found, eager.fake_quantize(rotated, rule))


@pytest.mark.parametrize("sums", DOTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_matrix_in_any_order(sums, dtype):
    values, matrix = whole_numbers((70, 64), 8, 3), whole_numbers((32, 32), 2, 4) / 4
    rotated = (values.view(-1, 32) @ matrix).view(70, 64)  # at most 32 * 8 * 2 quarters: exact
    found = rotate_quantize(values.to(DEVICE, dtype), matrix.to(DEVICE), sums=sums)
    assert equal(found, rotated)


def test_a_result_in_bfloat16_loses_nothing():
    values, matrix = torch.randn(9, 32, generator=draw(5)).to(DEVICE), orthogonal(6).to(DEVICE)
    room = torch.empty(9, 32, dtype=torch.bfloat16, device=DEVICE)
    wide = rotate_fake_quantize(values, matrix, sums=Sums.ASCENDING)
    found = rotate_fake_quantize(values, matrix, sums=Sums.ASCENDING, out=room)
    assert found is room
    assert same(room.float(), wide)


@pytest.mark.filterwarnings("ignore:(invalid|overflow) .* in (multiply|add):RuntimeWarning")
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_block_alone(special):
    values = torch.ones(3, 64)
    values[1, 40] = special
    found = rotate_quantize(values.to(DEVICE), torch.eye(32, device=DEVICE), sums=Sums.ASCENDING)
    assert (found.e8m0 == 255).nonzero().tolist() == [[1, 1]]
    assert found.packed[1, 16:].eq(0).all()


@needs_loops
@pytest.mark.parametrize(("blocks", "dtype"), [*((2, dtype) for dtype in DTYPES), (10, DTYPES[1])])
def test_a_chain(blocks, dtype, monkeypatch):
    """Bits of `GivensChain.apply` in float32, for both tilings of the kernel."""
    monkeypatch.setattr(two_level, "SHORT", 8)
    values = torch.randn(3, blocks * 32, generator=draw(blocks)).to(dtype)
    chain = equalize(spd(blocks, 30.0, seed=7))
    ready = prepare(chain.first, chain.second, chain.cos, chain.sin, blocks, DEVICE)
    for matrix in (None, orthogonal(8)):
        rotated = chained(values, chain, matrix)
        here = (values.to(DEVICE), ready, None if matrix is None else matrix.to(DEVICE))
        assert equal(two_level_quantize(*here, sums=Sums.ASCENDING), rotated)
        found = two_level_fake_quantize(*here, sums=Sums.ASCENDING)
        assert same(found, eager.fake_quantize(rotated))


@needs_loops
def test_a_chain_that_repeats_and_leaves_out_blocks():
    """More tokens than the programs take at once; blocks used three times, and never."""
    values = torch.randn(2, 9, 6 * 32, generator=draw(9))
    angle = torch.tensor([0.3, 1.1, -0.7, 2.0], dtype=torch.float64)
    first, second = torch.tensor([4, 1, 4, 1]), torch.tensor([1, 4, 0, 0])
    some = GivensChain(first, second, angle.cos(), angle.sin())
    for chain in (some, EMPTY_CHAIN):
        ready = prepare(chain.first, chain.second, chain.cos, chain.sin, 6, DEVICE)
        found = two_level_quantize(values.to(DEVICE), ready, sums=Sums.ASCENDING)
        assert equal(found, chained(values, chain, None))


@needs_loops
@pytest.mark.parametrize("sums", DOTS)
def test_dense_and_chain_meet_in_whole_numbers(sums):
    """With quarter turns both ways compute sums of whole numbers, which no order can change."""
    blocks = 66  # more than a tile
    values, intra = whole_numbers((6, blocks * 32), 2, 10), whole_numbers((32, 32), 1, 11)
    places = torch.randperm(blocks, generator=draw(12))
    turns = torch.ones(blocks - 1, dtype=torch.float64)
    chain = GivensChain(places[:-1], places[1:], 0 * turns, turns)
    inter = chain.matrix(blocks)
    rotated = (chain.apply(values.unflatten(-1, (-1, 32))) @ intra).flatten(-2)
    ready = prepare(chain.first, chain.second, chain.cos, chain.sin, blocks, DEVICE)
    for way in (ready, inter.to(DEVICE)):
        found = two_level_quantize(values.to(DEVICE), way, intra.to(DEVICE), sums=sums)
        assert equal(found, rotated)
    found = two_level_fake_quantize(values.to(DEVICE), inter.to(DEVICE), None, sums=sums)
    # As numbers: a quarter turn keeps the sign of 0, a sum does not.
    assert torch.equal(found.cpu(), eager.fake_quantize(chained(values, chain, None)))


@needs_loops
@pytest.mark.skipif(INTERPRETED, reason="the interpreter sums in one way, whatever it is told")
@pytest.mark.parametrize("sums", [Sums.IEEE, Sums.TF32X3])
def test_dense_sums_carry_float32(sums):
    """Before rounding cannot be seen, so: the codes differ only where the exact sum lies within
    the float32 bound of a cut, which for 64 x 64 blocks of noise is rarer than one in a thousand
    (bound 64 * 2^-23 of a magnitude, against cuts that are a fifth of it apart)."""
    values = torch.randn(64, 64 * 32, generator=draw(13))
    inter = torch.linalg.qr(torch.randn(64, 64, generator=draw(14), dtype=torch.float64))[0]
    exact = (inter.T @ values.double().unflatten(-1, (-1, 32))).flatten(-2).float()
    found = two_level_quantize(values.to(DEVICE), inter.to(DEVICE), sums=sums)
    assert (found.packed.cpu() != eager.quantize(exact).packed).float().mean() < 1e-3


def test_refused():
    values = torch.zeros(2, 64, device=DEVICE)
    square = torch.eye(2, device=DEVICE)
    ready = prepare(*(getattr(EMPTY_CHAIN, part) for part in PARTS), 3, DEVICE)
    with pytest.raises(UsageError, match="order of summation"):
        two_level_quantize(values, square, sums=Sums.ASCENDING)
    with pytest.raises(UsageError, match="chain over 3 blocks"):
        two_level_quantize(values, ready)
    with pytest.raises(UsageError, match=r"matrix \[2, 2\] there"):
        two_level_quantize(values, torch.eye(3, device=DEVICE))
    with pytest.raises(UsageError, match="blocks 0 to 5"):
        one = torch.ones(1, dtype=torch.float64)
        prepare(torch.tensor([0]), torch.tensor([5]), one, 0 * one, 3, DEVICE)
    with pytest.raises(FormatError):
        two_level_quantize(torch.zeros(2, 48, device=DEVICE), square)
    with pytest.raises(FormatError):
        rotate_quantize(torch.zeros(2, 48, device=DEVICE), torch.eye(32, device=DEVICE))
    with pytest.raises(UsageError, match="contiguous"):
        room = torch.empty(2, 64, dtype=torch.float16, device=DEVICE)
        rotate_fake_quantize(values, torch.eye(32, device=DEVICE), out=room)


PARTS = ("first", "second", "cos", "sin")
