"""What reaches the Triton kernels from above, and what stays eager."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import dequantize, fake_quantize, quantize
from mxtorq.kernels import dispatch
from mxtorq.kernels.dispatch import Backend
from mxtorq.rounding.group import fix_group_
from mxtorq.surgery.site_input import SiteInput
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.torq.inter_block import equalize
from mxtorq.transforms.torq.rotation import TwoLevelRotation
from triton_device import DEVICE, needs_loops, same

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def only_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` picks Triton where these tests run, the interpreter's CPU included."""
    monkeypatch.setattr(dispatch, "_DEVICES", {Backend.TRITON: DEVICE.type})


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_format_functions() -> None:
    values = drawn(5, 96)
    codes, expected = dispatch.quantize(values), quantize(values)
    assert all(same(a, b) for a, b in zip(codes, expected, strict=True))
    assert same(dispatch.fake_quantize(values), fake_quantize(values))
    assert same(dispatch.dequantize(codes), dequantize(expected))


def test_rotations() -> None:
    values, matrix = drawn(5, 96), sylvester(32).to(DEVICE)
    found = dispatch.rotate_fake_quantize(values, matrix[None])
    assert same(found, dispatch.dequantize(dispatch.rotate_quantize(values, matrix[None])))
    rotated = dispatch.rotate(values, matrix[None])
    # The same sums up to their rounding; a block's scale is at most a quarter of its maximum, and
    # a value that falls on the other side of a cut moves by no more than one step, twice the scale.
    assert (found - fake_quantize(rotated)).abs().max() <= rotated.abs().max() / 2
    assert ((found != fake_quantize(rotated)).float().mean()) < 0.01
    many = matrix.expand(3, 32, 32)
    with pytest.raises(UsageError, match="a number of matrices"):
        dispatch.rotate_fake_quantize(values, many, backend="triton")
    eager = dispatch.rotate_fake_quantize(values, many, backend="eager")
    assert same(dispatch.rotate_fake_quantize(values, many), eager)


@pytest.mark.parametrize("given", [False, True])
def test_a_group_of_gptq(given: bool) -> None:
    columns, follow = drawn(32, 21), 0.1 * drawn(32, 32)
    scales = torch.full((3, 21), 0.25, device=DEVICE)
    results = []
    for backend in ("eager", "triton"):
        own, room = columns.clone(), scales.clone()
        rule = None if given else ScaleRule.FLOOR
        codes = fix_group_(own, follow, room, [1] * 32, rule, backend)
        results.append((codes, own, room))
    assert all(same(b, a) for a, b in zip(*results, strict=True))
    assert same(results[0][2], scales) is given


@needs_loops
def test_the_input_of_a_torq_site() -> None:
    root = drawn(3, 6).double().cpu() * torch.tensor([[1.0], [3.0], [9.0]], dtype=torch.float64)
    chain = equalize(root @ root.T)
    assert len(chain)
    values = drawn(2, 4, 96)
    exact = TwoLevelRotation(96, chain, None).to(DEVICE)
    found = SiteInput(exact, ScaleRule.FLOOR)(values)
    assert same(found, fake_quantize(exact.apply(values)))  # a chain alone has the same bits
    both = TwoLevelRotation(96, chain, sylvester(32)).to(DEVICE)
    found = SiteInput(both, ScaleRule.FLOOR)(values.bfloat16())
    assert found.dtype == torch.bfloat16
    rotated = both.apply(values.bfloat16().float())
    assert ((found.float() != fake_quantize(rotated)).float().mean()) < 0.01
