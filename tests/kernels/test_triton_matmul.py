"""W4A4 products against float64: exactly where sums are representable, else within a bound."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from mxtorq.errors import FormatError, UsageError
from mxtorq.formats.mxfp4 import MXFP4, dequantize, quantize
from mxtorq.kernels.triton.matmul import INNER, matmul
from triton_device import DEVICE, needs_loops, same

pytestmark = needs_loops
SHAPES = [
    (1, 130, 96),  # one token, K below one step, rows beyond a tile
    (5, 64, 2 * INNER),
    (16, 200, 32),
    (40, 150, 2 * INNER + 32),  # a step that is not whole
    (130, 129, INNER + 32),  # more than one tile each way
]


def exact(tokens: int, width: int, seed: int) -> MXFP4:
    """Any codes under scales 1/2, 1 and 2: products are multiples of 1/16 up to 144, so that sums
    over fewer than 2^13 features are exact in float32 in any order."""
    draw = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (tokens, width // 2), generator=draw)
    scales = torch.randint(126, 129, (tokens, width // 32), generator=draw)
    return MXFP4(packed.to(torch.uint8), scales.to(torch.uint8))


def here(stored: MXFP4) -> MXFP4:
    return MXFP4(*(part.to(DEVICE) for part in stored))


def product(left: MXFP4, right: MXFP4) -> torch.Tensor:
    return dequantize(left, torch.float64) @ dequantize(right, torch.float64).T


@pytest.mark.parametrize(("tokens", "rows", "width"), SHAPES)
def test_exact_sums(tokens, rows, width):
    x, weight = exact(tokens, width, 1), exact(rows, width, 2)
    expected = product(x, weight).float()
    assert same(matmul(here(x), here(weight)), expected)
    bias = torch.arange(rows, dtype=torch.float32) / 16
    assert same(matmul(here(x), here(weight), bias.to(DEVICE)), expected + bias)
    found = matmul(here(x), here(weight), bias.to(DEVICE), torch.bfloat16)
    assert same(found, (expected + bias).bfloat16())


@pytest.mark.parametrize("splits", [2, 3, 100])
def test_parts_of_k(splits):
    x, weight = exact(3, 5 * INNER + 64, 3), exact(140, 5 * INNER + 64, 4)
    expected = product(x, weight).float()
    bias = torch.ones(140, dtype=torch.bfloat16)
    found = matmul(here(x), here(weight), bias.to(DEVICE), splits=splits)
    assert same(found, expected + 1)


@pytest.mark.parametrize(("tokens", "rows", "width"), SHAPES)
def test_any_numbers(tokens, rows, width):
    """Products are exact; each of K sums is rounded or cut at 2^-23 of what has been summed."""
    draw = torch.Generator().manual_seed(5)
    x = quantize(torch.randn(tokens, width, generator=draw))
    weight = quantize(torch.randn(rows, width, generator=draw).exp())
    magnitude = dequantize(x, torch.float64).abs() @ dequantize(weight, torch.float64).abs().T
    found = matmul(here(x), here(weight)).cpu()
    assert ((found - product(x, weight)).abs() <= width * 2.0**-23 * magnitude).all()


def test_nan_blocks():
    x, weight = exact(3, 128, 6), exact(5, 128, 7)
    x.e8m0[1, 2] = 255
    weight.e8m0[4, 0] = 255
    nan = matmul(here(x), here(weight)).isnan().cpu()
    assert nan[1].all()
    assert nan[:, 4].all()
    assert nan.sum() == 5 + 3 - 1


def test_shapes_and_results_that_exist_already():
    x, weight = exact(6, 64, 8), exact(10, 64, 9)
    deep = MXFP4(*(part.view(2, 3, -1) for part in here(x)))
    room = torch.empty(2, 3, 10, device=DEVICE)
    assert matmul(deep, here(weight), out=room) is room
    assert same(room, product(x, weight).float().view(2, 3, 10))
    none = MXFP4(*(part[:0] for part in here(x)))
    assert matmul(none, here(weight)).shape == (0, 10)


def test_refused():
    x, weight = here(exact(6, 64, 8)), here(exact(10, 96, 9))
    with pytest.raises(FormatError, match="same features"):
        matmul(x, weight)
    with pytest.raises(UsageError, match="float32 or bfloat16"):
        matmul(x, x, dtype=torch.float64)
    with pytest.raises(UsageError, match="contiguous"):
        matmul(x, x, out=torch.empty(6, 5, device=DEVICE))
