"""What every method and every transform must keep, over the tables themselves."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from mxtorq.config import parse_method
from mxtorq.errors import FormatError, UsageError
from mxtorq.kernels import dispatch
from mxtorq.transforms import KINDS, METHODS
from mxtorq.transforms.base import Rotation, SiteStatistics, Transform, TransformMethod
from mxtorq.transforms.rotation import BlockRotation, require_orthogonal

VARIANTS = [
    "hadamard:size=128",
    "duquant++:shared=false",
    "duquant++:index=column:steps=16",
    "duquant++:smooth=false",
    "wush:curvature=block",
    "wush:hadamard=false",
    "hires:interaction=false",
    "smoothquant:sites=all",
    "brq:size=16",
]
SPECS = [*METHODS, "torq:levels=inter", "torq:levels=intra", *VARIANTS]
EPS = torch.finfo(torch.float64).eps
WIDTH = 384  # blocks of 32 and of 128, a Hadamard matrix of 12, more than one block of each


@pytest.fixture(scope="module")
def site() -> SiteStatistics:
    return oracles.statistics(WIDTH)


def seen_by(method: TransformMethod, site: SiteStatistics) -> SiteStatistics:
    """What a run would give the method."""
    return oracles.judged(site) if method.chooses else site


@pytest.fixture(scope="module", params=SPECS)
def transform(request: pytest.FixtureRequest, site: SiteStatistics) -> Transform:
    method = parse_method(request.param)
    return method.fit(seen_by(method, site), seed=3)


def test_methods_fulfil_the_protocol() -> None:
    assert all(isinstance(factory(), TransformMethod) for factory in METHODS.values())


@pytest.mark.parametrize("spec", METHODS)
def test_who_needs_the_second_moment_says_so(spec: str, site: SiteStatistics) -> None:
    method = parse_method(spec)
    without = replace(seen_by(method, site), second_moment=None)
    if method.needs_hessian:
        with pytest.raises(UsageError, match="needs_hessian"):
            method.fit(without, seed=3)
        return
    expected, found = (method.fit(seen, seed=3).tensors() for seen in (site, without))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_products_are_kept(transform: Transform) -> None:
    """x' W'^T = x W^T in float64. Each entry sums d products of transformed numbers, which are
    themselves sums of at most d terms on either side; what is not orthogonal magnifies both sides'
    rounding by at most its condition number."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(11, WIDTH, dtype=torch.float64, generator=draw)
    w = torch.randn(13, WIDTH, dtype=torch.float64, generator=draw)
    condition = torch.linalg.cond(transform.matrix())
    bound = 4 * WIDTH * EPS * condition * (x.norm(dim=1)[:, None] * w.norm(dim=1))
    assert ((transform.apply(x) @ transform.fuse(w).T - x @ w.T).abs() <= bound).all()


def test_it_is_linear_and_invertible(transform: Transform) -> None:
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    dense = transform.matrix()
    largest = torch.linalg.matrix_norm(dense, 2)
    bound = 4 * WIDTH * EPS * x.norm(dim=1).max() * largest
    assert (transform.apply(x) - x @ dense).abs().max() <= bound
    assert torch.linalg.cond(dense) < 1e6
    if isinstance(transform, Rotation):
        eye = torch.eye(WIDTH, dtype=torch.float64)
        assert (dense.T @ dense - eye).abs().max() <= 4 * WIDTH * EPS


def test_dtype_and_leading_axes_are_kept(transform: Transform) -> None:
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        y = transform.apply(x.to(dtype))
        assert y.dtype == dtype
        assert y.shape == x.shape
    exact = transform.apply(x)
    largest = torch.linalg.matrix_norm(transform.matrix(), 2)
    bound = 4 * WIDTH * torch.finfo(torch.float32).eps * x.norm(dim=-1).max() * largest
    assert (transform.apply(x.float()).double() - exact).abs().max() <= bound


def test_it_serialises(transform: Transform) -> None:
    parts = {name: tensor.clone() for name, tensor in transform.tensors().items()}
    again = KINDS[transform.kind].from_tensors(WIDTH, parts)
    x = torch.randn(5, WIDTH)
    assert torch.equal(again.apply(x), transform.apply(x))
    assert again.multiply_adds == transform.multiply_adds


def test_the_counted_cost_is_the_measured_one(
    transform: Transform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiplications of one token, counted where torch executes them."""
    monkeypatch.setattr(dispatch, "_installed", lambda backend: False)
    with Multiplications() as counted:
        transform.apply(torch.randn(1, WIDTH))
    assert counted.total == transform.multiply_adds


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of matrix products and of elementwise products."""

    total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name()
        if name in ("aten::mm", "aten::bmm"):
            self.total += result.numel() * args[0].shape[-1]
        elif name in ("aten::mul.Tensor", "aten::mul_.Tensor", "aten::addcmul", "aten::addcmul_"):
            self.total += result.numel()
        elif "mul" in name or "mm" in name or "matmul" in name:
            raise AssertionError(f"{name} is not counted")
        return result


def test_it_is_deterministic(site: SiteStatistics) -> None:
    for spec in SPECS:
        method = parse_method(spec)
        first, second = (method.fit(seen_by(method, site), seed=5).tensors() for _ in range(2))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_input_is_left_alone(transform: Transform) -> None:
    x = torch.randn(5, WIDTH)
    before = x.clone()
    transform.apply(x)
    assert torch.equal(x, before)


def test_hadamard_is_the_sylvester_matrix(site: SiteStatistics) -> None:
    dense = parse_method("hadamard").fit(site, 0).matrix()
    block = dense[:32, :32] * math.sqrt(32)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
    assert torch.allclose(block, torch.tensor(signs, dtype=torch.float64), atol=1e-14)
    assert torch.equal(dense[32:64, 32:64], dense[:32, :32])
    assert dense[:32, 32:].abs().max() == 0


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(32), "float32"),
        (2 * torch.eye(32, dtype=torch.float64), "differs from I"),
        (torch.ones(3, 4, dtype=torch.float64), "shape"),
    ],
)
def test_what_is_no_rotation_is_refused(matrix: torch.Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        require_orthogonal(matrix, "block-rotation")


def test_a_width_that_blocks_do_not_divide_is_refused() -> None:
    with pytest.raises(FormatError, match="do not divide"):
        BlockRotation(80, torch.eye(32, dtype=torch.float64))


def test_block_second_moment_is_the_definition(site: SiteStatistics) -> None:
    x = site.sample.double().unflatten(-1, (-1, 32))
    direct = torch.einsum("nbk,nck->bc", x, x) / (len(x) * 32)
    assert torch.allclose(site.block_second_moment(), direct, rtol=1e-12)
