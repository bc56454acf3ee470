"""DuQuant++ ("duquant++") and DuQuant ("duquant") as methods."""

from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

import oracles
from mxtorq.errors import UsageError
from mxtorq.formats.mxfp4 import fake_quantize
from mxtorq.models.family import SiteName
from mxtorq.transforms import KINDS, METHODS
from mxtorq.transforms.base import NetworkShape, SiteStatistics, Transform, TransformMethod
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.chain import Chain
from mxtorq.transforms.duquant.greedy import Index, greedy_rotation, random_base
from mxtorq.transforms.duquant.method import DuQuant, DuQuantPlusPlus, site_generator
from mxtorq.transforms.duquant.zigzag import zigzag_order
from mxtorq.transforms.rotation import BlockRotation
from mxtorq.transforms.smoothing import Reader, smoothing

EPS = torch.finfo(torch.float64).eps
WIDTH = 256


@pytest.fixture(scope="module")
def site() -> SiteStatistics:
    rows = oracles.activations(200, WIDTH, outliers=4, seed=7)
    draw = torch.Generator().manual_seed(1)
    weights = (0.05 * torch.randn(out, WIDTH, generator=draw) for out in (96, 32, 32))
    return oracles.site(rows, *weights, name=SiteName.QKV_IN)


def links(transform: Transform) -> list[str]:
    return [link.kind for link in transform.links] if isinstance(transform, Chain) else []


def shape(**widths: int) -> NetworkShape:
    sites = MappingProxyType({SiteName(name): width for name, width in widths.items()})
    return NetworkShape(hidden=WIDTH, heads=4, kv_heads=2, head_dim=64, layers=1, sites=sites)


VARIANTS = [
    DuQuantPlusPlus(steps=20),
    DuQuantPlusPlus(steps=20, shared=False, index=Index.COLUMN),
    DuQuantPlusPlus(steps=20, smooth=False, block=64),
    DuQuant(steps=10),
    DuQuant(steps=10, block=32, reader=Reader.ALL),
]


@pytest.mark.parametrize("method", VARIANTS)
def test_products_are_kept(site: SiteStatistics, method: TransformMethod) -> None:
    """x' W'^T = x W^T. Each entry sums d products of numbers that passed at most four links of d
    terms each; smoothing scales a channel and its column by s and 1/s, whose range multiplies the
    bound."""
    transform = method.fit(site, seed=3)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(11, WIDTH, dtype=torch.float64, generator=draw)
    w = torch.randn(13, WIDTH, dtype=torch.float64, generator=draw)
    singular = torch.linalg.svdvals(transform.matrix())
    bound = 8 * WIDTH * EPS * (singular[0] / singular[-1]) * x.norm(dim=1)[:, None] * w.norm(dim=1)
    assert ((transform.apply(x) @ transform.fuse(w).T - x @ w.T).abs() <= bound).all()


@pytest.mark.parametrize("method", VARIANTS)
def test_it_serialises_and_repeats(site: SiteStatistics, method: TransformMethod) -> None:
    transform, again = method.fit(site, seed=3), method.fit(site, seed=3)
    parts, same = transform.tensors(), again.tensors()
    assert all(torch.equal(parts[name], same[name]) for name in parts)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    read = KINDS[transform.kind].from_tensors(WIDTH, parts)
    assert torch.equal(read.apply(x), transform.apply(x))


def test_the_links(site: SiteStatistics) -> None:
    assert METHODS["duquant++"] is DuQuantPlusPlus
    assert METHODS["duquant"] is DuQuant
    plus = DuQuantPlusPlus(steps=5).fit(site, 0)
    assert links(plus) == ["diagonal", "block-rotation"]
    assert plus.multiply_adds == WIDTH + 32 * WIDTH
    each = DuQuantPlusPlus(steps=5, shared=False).fit(site, 0)
    assert links(each) == ["diagonal", "block-matrices"]
    assert isinstance(DuQuantPlusPlus(steps=5, smooth=False).fit(site, 0), BlockRotation)
    both = DuQuant(steps=5).fit(site, 0)
    assert links(both) == ["diagonal", "block-rotation", "permutation", "block-rotation"]
    assert both.multiply_adds == WIDTH + 2 * 128 * WIDTH
    assert links(DuQuant(steps=5, smooth=False).fit(site, 0))[0] == "block-rotation"


def test_the_search_sees_smoothed_pooled_rows(site: SiteStatistics) -> None:
    fitted = DuQuantPlusPlus(steps=30).fit(site, seed=9)
    smoother = smoothing(site, 0.6, Reader.RELEASED)
    rows = smoother.apply(site.sample.double()).reshape(-1, 32)
    base = random_base(32, site_generator(9, site.site))
    direct = greedy_rotation(rows, base, steps=30, index=Index.ROW)
    assert torch.equal(fitted.tensors()["0.diagonal.factors"], smoother.factors)
    assert torch.equal(fitted.tensors()["1.block-rotation.rotation"], direct.rotation)


def test_the_permutation_balances_what_the_first_rotation_leaves(site: SiteStatistics) -> None:
    fitted = DuQuant(steps=10).fit(site, seed=9)
    assert isinstance(fitted, Chain)
    rows = fitted.links[1].apply(fitted.links[0].apply(site.sample.double()))
    expected = zigzag_order(rows.abs().amax(0), 128)
    assert torch.equal(fitted.links[2].tensors()["order"], expected)
    rotations = [fitted.links[at].tensors()["rotation"] for at in (1, 3)]
    assert (rotations[0] - rotations[1]).abs().max() > 0.01


def test_blocks_of_their_own_are_fitted_to_their_block(site: SiteStatistics) -> None:
    """No block's peak rises, which a shared rotation does not promise. Rounding: 30 products."""
    fitted = DuQuantPlusPlus(steps=30, shared=False, smooth=False).fit(site, 0)
    assert isinstance(fitted, BlockMatrices)
    before = site.sample.double().unflatten(-1, (-1, 32)).transpose(0, 1).flatten(1)
    after = fitted.apply(site.sample.double()).unflatten(-1, (-1, 32)).transpose(0, 1).flatten(1)
    rise = (after.amax(1) - after.amin(1)) - (before.amax(1) - before.amin(1))
    assert rise.max() <= 1e-9 * before.abs().max()


def test_seed_and_site_decide_the_draw(site: SiteStatistics) -> None:
    method = DuQuantPlusPlus(steps=10)
    first = method.fit(site, seed=0).tensors()["1.block-rotation.rotation"]
    seed = method.fit(site, seed=1).tensors()["1.block-rotation.rotation"]
    name = method.fit(replace(site, site="model.layers.1.qkv_in"), seed=0)
    assert not torch.equal(first, seed)
    assert not torch.equal(first, name.tensors()["1.block-rotation.rotation"])


@pytest.mark.parametrize("index", list(Index))
def test_it_lowers_the_error_of_activations_with_outliers(
    site: SiteStatistics, index: Index
) -> None:
    """Either index does: the released code's row in place of the column is harmless."""

    def error(x: torch.Tensor) -> float:
        return ((fake_quantize(x) - x).square().sum() / x.square().sum()).item()

    rotated = DuQuantPlusPlus(index=index, smooth=False).fit(site, 0).apply(site.sample)
    assert error(rotated) < error(site.sample)


@pytest.mark.parametrize("method", [DuQuant, DuQuantPlusPlus])
@pytest.mark.parametrize(
    "wrong", [{"alpha": -0.1}, {"alpha": 1.1}, {"alpha": float("nan")}, {"steps": 0}, {"block": 48}]
)
def test_options_are_checked_at_birth(
    method: type[DuQuant | DuQuantPlusPlus], wrong: dict[str, float]
) -> None:
    with pytest.raises(UsageError):
        method(**wrong)


def test_widths_that_blocks_do_not_fill_are_refused(site: SiteStatistics) -> None:
    with pytest.raises(UsageError, match=r"down_in has 672(.|\n)*block=32"):
        DuQuant().check(shape(qkv_in=256, down_in=672))
    with pytest.raises(UsageError, match="block=64"):
        DuQuantPlusPlus(block=128).check(shape(qkv_in=256, down_in=704))
    DuQuant(block=32).check(shape(qkv_in=256, down_in=672))
    DuQuantPlusPlus().check(shape(qkv_in=256, down_in=672))
    narrow = replace(
        site,
        sample=site.sample[:, :160],
        second_moment=site.hessian[:160, :160],
        amax=site.amax[:160],
        weights=tuple(weight[:, :160] for weight in site.weights),
    )
    with pytest.raises(UsageError, match="block=32"):
        DuQuant().fit(narrow, 0)
