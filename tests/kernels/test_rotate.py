"""Rotation and rounding in one go: a chain of fused multiply-adds, then the bits of `mxfp4`."""

import ctypes
import ctypes.util

import numpy as np
import pytest
import torch

from mxtorq.errors import FormatError
from mxtorq.formats import mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.kernels import dispatch, eager
from mxtorq.kernels.dispatch import Backend, rotate, rotate_fake_quantize, rotate_quantize

EPS = torch.finfo(torch.float32).eps


def drawn(
    rows: int, blocks: int, matrices: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 32 * blocks, generator=draw)
    return values, torch.linalg.qr(torch.randn(matrices, 32, 32, generator=draw))[0].contiguous()


@pytest.fixture(params=["eager", "numba"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "numba":
        pytest.importorskip("numba", reason="the extra numba is not installed")
    return str(request.param)


@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 33, 700])
def test_each_block_meets_its_matrix(backend: str, rows: int, matrices: int) -> None:
    values, rotations = drawn(rows, 3, matrices)
    found = rotate(values, rotations, backend=backend)
    wide, exact = values.double(), rotations.double().expand(3, 32, 32)
    for block in range(3):
        here = slice(32 * block, 32 * block + 32)
        # 32 roundings of partial sums that stay below sum |x| |r|.
        bound = 32 * EPS * (wide[:, here].abs() @ exact[block].abs())
        assert ((found[:, here] - wide[:, here] @ exact[block]).abs() <= bound).all()
    assert not torch.equal(found, rotate(values, rotations.mT.contiguous(), backend=backend))


@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.RCEIL])
def test_rounding_is_that_of_the_format(backend: str, rule: ScaleRule, matrices: int) -> None:
    values, rotations = drawn(47, 3, matrices, seed=1)
    values[3, 5], values[4, 70], values[5] = float("nan"), float("inf"), 0.0
    rotated = rotate(values, rotations, backend=backend)
    found = rotate_fake_quantize(values, rotations, rule, backend=backend)
    torch.testing.assert_close(
        found, mxfp4.fake_quantize(rotated, rule), rtol=0, atol=0, equal_nan=True
    )
    codes, expected = (
        rotate_quantize(values, rotations, rule, backend=backend),
        mxfp4.quantize(rotated, rule),
    )
    assert torch.equal(codes.packed, expected.packed)
    assert torch.equal(codes.e8m0, expected.e8m0)


def test_bfloat16_is_rotated_in_float32(backend: str) -> None:
    values, rotations = drawn(21, 2, 1, seed=2)
    narrow = values.bfloat16()
    found = rotate_fake_quantize(narrow, rotations, backend=backend)
    assert found.dtype == torch.bfloat16
    expected = rotate_fake_quantize(narrow.float(), rotations, backend=backend)
    assert torch.equal(found.float(), expected)
    codes = rotate_quantize(narrow, rotations, backend=backend)
    assert torch.equal(mxfp4.dequantize(codes), expected)


def test_given_memory(backend: str) -> None:
    values, rotations = drawn(9, 2, 2, seed=3)
    out = torch.empty_like(values)
    assert rotate(values, rotations, out=out, backend=backend) is out
    assert torch.equal(out, rotate(values, rotations, backend=backend))
    expected = rotate_fake_quantize(values, rotations, backend=backend)
    rotate_fake_quantize(values, rotations, out=values, backend=backend)
    assert torch.equal(values, expected)
    with pytest.raises(FormatError, match="an out"):
        rotate(values, rotations, out=torch.empty(64, 9).T, backend=backend)


def test_numba_is_a_chain_of_fused_multiply_adds() -> None:
    """Against the C library's fmaf, one element after the other."""
    pytest.importorskip("numba", reason="the extra numba is not installed")
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    library.fmaf.restype, library.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    values, rotations = drawn(5, 2, 2, seed=4)
    found = rotate(values, rotations, backend=Backend.NUMBA)
    for row, block in np.ndindex(5, 2):
        x, matrix = values[row, 32 * block : 32 * block + 32], rotations[block]
        for column in range(32):
            total = 0.0
            for k in range(32):
                total = library.fmaf(float(x[k]), float(matrix[k, column]), total)
            assert found[row, 32 * block + column].item() == total


def test_eager_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same products as over the whole tensor, up to the BLAS's order for other shapes."""
    values, rotations = drawn(300, 4, 4, seed=5)
    whole = eager.rotate(values, rotations)
    monkeypatch.setattr(mxfp4, "CHUNK_BLOCKS", 64)
    bound = 64 * EPS * values.abs().amax() * 32
    assert (eager.rotate(values, rotations) - whole).abs().max() <= bound
    with pytest.raises(FormatError, match="multiple of 32"):
        eager.rotate_fake_quantize(values[:, :33], rotations[:1])


def test_gradients_take_the_eager_path() -> None:
    values, rotations = drawn(3, 2, 1, seed=6)
    values.requires_grad_(True)
    dispatch.rotate(values, rotations).square().sum().backward()
    # d |x R|^2 / dx = 2 x R R^T = 2 x for a rotation.
    assert (values.grad - 2 * values).abs().max() <= 64 * EPS * values.abs().max() * 32
