"""The shared input of a site: done once, never stale, in chunks that change nothing."""

import gc
import weakref

import pytest
import torch

from mxtorq.formats import mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import fake_quantize, quantize
from mxtorq.formats.scales import NonOCPScale
from mxtorq.surgery.linear import MXFP4Linear, keep_weights_
from mxtorq.surgery.site_input import SiteInput
from mxtorq.transforms.chain import chain
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.rotation import BlockRotation, Identity


class Counted(SiteInput):
    """Counts how often the work is done."""

    done = 0

    def _round(self, inputs: torch.Tensor) -> torch.Tensor:
        self.done += 1
        return super()._round(inputs)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_linears_of_a_site_share_the_work() -> None:
    site = Counted(BlockRotation(64, sylvester(32)), ScaleRule.FLOOR, readers=3)
    codes = quantize(drawn(8, 64))
    linears = [MXFP4Linear(codes, None, site) for _ in range(3)]
    x = drawn(5, 64)
    expected = MXFP4Linear(codes, None, BlockRotation(64, sylvester(32)), ScaleRule.FLOOR)(x)
    for _ in range(2):
        for linear in linears:
            assert torch.equal(linear(x), expected)
    assert site.done == 2


def test_nothing_stale_is_used() -> None:
    site = Counted(Identity(32), ScaleRule.FLOOR, readers=2)
    x = drawn(4, 32)
    first = site(x)
    x.mul_(3)  # the same tensor, with other values
    assert torch.equal(site(x), fake_quantize(x))
    assert not torch.equal(first, fake_quantize(x))
    y = drawn(4, 32) + 1
    assert torch.equal(site(y), fake_quantize(y))
    assert torch.equal(site(x), fake_quantize(x))
    with torch.inference_mode():  # tensors without a count of their changes
        z = drawn(4, 32)
        site(z)
        z.mul_(3)
        assert torch.equal(site(z), fake_quantize(z))


def test_nothing_is_kept_longer_than_needed() -> None:
    site = SiteInput(Identity(32), ScaleRule.FLOOR, readers=2)
    x = drawn(4, 32)
    kept = weakref.ref(site(x))
    gc.collect()
    assert kept() is not None
    site(x)
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(3, 50, 96).to(dtype)
    factors = torch.linspace(0.5, 2, 96, dtype=torch.float64)
    transform = chain(Diagonal(factors), BlockRotation(96, sylvester(32)))
    expected = fake_quantize(transform.apply(x.float())).to(dtype)
    assert torch.equal(SiteInput(transform, ScaleRule.FLOOR)(x), expected)
    monkeypatch.setattr(mxfp4, "CHUNK_BLOCKS", 12)
    found = SiteInput(transform, ScaleRule.FLOOR)(x)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert torch.equal(found, expected)


def test_other_dtypes_go_through_float32() -> None:
    site = SiteInput(BlockRotation(96, sylvester(32)), ScaleRule.FLOOR)
    for dtype in (torch.float16, torch.float64):
        x = drawn(5, 96).to(dtype)
        found = site(x)
        assert found.dtype == dtype
        assert torch.equal(found, site(x.float()).to(dtype))


def test_scales_of_the_whole_tensor_see_the_whole_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(50, 96) * torch.arange(50)[:, None]
    monkeypatch.setattr(mxfp4, "CHUNK_BLOCKS", 12)
    site = SiteInput(Identity(96), NonOCPScale.LOG256)
    monkeypatch.undo()
    whole = SiteInput(Identity(96), NonOCPScale.LOG256)
    assert torch.equal(site(x), whole(x))


def test_weights_are_kept_while_there_is_room() -> None:
    codes = quantize(drawn(64, 64))
    model = torch.nn.Sequential(
        *(MXFP4Linear(codes, None, Identity(64), ScaleRule.FLOOR) for _ in range(3))
    )
    x = drawn(40, 64)
    expected = model(x)
    assert all(linear._kept is None for linear in model)
    assert keep_weights_(model, limit=2 * 64 * 64 * 4) == 2 * 64 * 64 * 4
    assert torch.equal(model(x), expected)
    assert [linear._kept is None for linear in model] == [False, False, True]
    assert "_kept" not in model.state_dict()
    assert torch.equal(model(x), expected)
    found = model(x.bfloat16())  # another dtype is another copy
    assert model[0]._kept.dtype == found.dtype == torch.bfloat16
    model.to(torch.float32)
    assert all(linear._kept is None for linear in model)
    assert keep_weights_(model, limit=0) == 0
