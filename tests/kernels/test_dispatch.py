"""Who computes: the choice, its errors, and threads that change no bit."""

import pytest
import torch

from mxtorq.errors import UsageError
from mxtorq.formats import scales
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import NonOCPScale, ScaledE2M1
from mxtorq.kernels import dispatch
from mxtorq.kernels.dispatch import Backend, pick

CPU = torch.device("cpu")


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda backend: True)
    assert pick("auto", CPU) is Backend.NUMBA
    assert pick("auto", torch.device("cuda")) is Backend.TRITON
    assert pick("auto", torch.device("mps")) is Backend.EAGER
    assert pick("eager", torch.device("cuda")) is Backend.EAGER
    monkeypatch.setattr(dispatch, "_installed", lambda backend: False)
    assert pick("auto", CPU) is Backend.EAGER
    assert pick("auto", torch.device("cuda")) is Backend.EAGER


def test_a_named_backend_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"'cuda'.*\n.*auto, eager, numba, triton"):
        pick("cuda", CPU)
    monkeypatch.setattr(dispatch, "_installed", lambda backend: True)
    with pytest.raises(UsageError, match="kernels for cuda devices"):
        pick("triton", CPU)
    with pytest.raises(UsageError, match="kernels for cpu devices"):
        pick("numba", torch.device("cuda"))
    monkeypatch.setattr(dispatch, "_installed", lambda backend: False)
    with pytest.raises(UsageError, match=r"pip install 'mxtorq\[numba\]'"):
        pick("numba", CPU)


def test_other_scales_go_to_their_own_functions() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    rounded = dispatch.quantize(values, NonOCPScale.LOG256)
    assert isinstance(rounded, ScaledE2M1)
    assert torch.equal(dispatch.dequantize(rounded), scales.dequantize(rounded))
    fake = dispatch.fake_quantize(values, NonOCPScale.LOG256)
    assert torch.equal(fake, scales.dequantize(rounded))
    assert isinstance(dispatch.quantize(values), MXFP4)


def test_float64_values_are_eager() -> None:
    """Where float32 would overflow: 6 x 2^127."""
    largest = MXFP4(torch.full((16,), 0x77, dtype=torch.uint8), torch.tensor([254]).byte())
    assert dispatch.dequantize(largest, torch.float64).tolist() == [6 * 2.0**127] * 32


def test_what_a_named_backend_has_no_kernel_for_is_refused() -> None:
    pytest.importorskip("numba", reason="the extra numba is not installed")
    codes = dispatch.quantize(torch.ones(1, 32))
    with pytest.raises(UsageError, match="not replaced by another"):
        dispatch.dequantize(codes, torch.float64, backend="numba")
    values, matrix = torch.ones(1, 32).double(), torch.eye(32)[None]
    with pytest.raises(UsageError, match="not replaced by another"):
        dispatch.rotate(values, matrix, backend="numba")
    assert torch.equal(dispatch.rotate(values, matrix), values)
