"""HiRes' stage I as a method."""

import itertools

import pytest
import torch

import oracles
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import fake_quantize
from mxtorq.transforms.base import SiteStatistics, TransformMethod
from mxtorq.transforms.hadamard import Hadamard, sylvester
from mxtorq.transforms.hires import geometry
from mxtorq.transforms.hires.method import HiRes, product_error
from mxtorq.transforms.rotation import IdentityMethod
from mxtorq.transforms.wush import input_moments, weight_moments

EPS = torch.finfo(torch.float64).eps
ABLATION = [HiRes(interaction=k, balance=d) for k, d in itertools.product((False, True), repeat=2)]


def correlated(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs that share half as many factors as there are channels, with 6 outliers."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 2, width, generator=draw) / (width // 2) ** 0.5
    rows = torch.randn(tokens, width // 2, generator=draw) @ mix
    rows += 0.3 * torch.randn(tokens, width, generator=draw)
    where = torch.randperm(width, generator=draw)[:6]
    rows[:, where] *= 10 + 30 * torch.rand(6, generator=draw)
    return rows


def random_weight(outputs: int, width: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    columns = torch.exp(0.5 * torch.randn(width, generator=draw))
    return 0.02 * torch.randn(outputs, width, generator=draw) * columns


@pytest.fixture(scope="module")
def site() -> SiteStatistics:
    return oracles.site(correlated(500, 96, seed=1), random_weight(70, 96, seed=2))


@pytest.mark.parametrize("method", ABLATION, ids=str)
def test_determinant_and_condition(site: SiteStatistics, method: HiRes) -> None:
    """|det| = 1: P, I + K, H and D all have it. Condition at most 8, times 9/7, times 2^(1/4)."""
    matrices = method.fit(site, 0).matrices
    assert torch.linalg.slogdet(matrices).logabsdet.abs().max() <= 100 * 32 * EPS
    limit = 8 * (9 / 7 if method.interaction else 1) * (2**0.25 if method.balance else 1)
    assert torch.linalg.cond(matrices).max() <= limit * (1 + 1e-9)


@pytest.mark.parametrize("method", ABLATION, ids=str)
def test_products_are_kept(site: SiteStatistics, method: HiRes) -> None:
    """Sums of 32 terms, times a condition of at most 13."""
    transform = method.fit(site, 0)
    x, w = site.sample.double(), site.weight
    bound = 4 * 96 * EPS * 13 * x.norm(dim=1)[:, None] * w.norm(dim=1)
    assert ((transform.apply(x) @ transform.fuse(w).T - x @ w.T).abs() <= bound).all()


def test_without_interaction_and_balance_it_is_p_and_the_hadamard(site: SiteStatistics) -> None:
    p = geometry.reference(
        geometry.ridged(input_moments(site)), geometry.ridged(weight_moments(site))
    )
    plain = ABLATION[0].fit(site, 0).matrices
    assert (plain - p @ sylvester(32)).abs().max() == 0


def test_interaction_is_that_of_the_anchor_pass(site: SiteStatistics) -> None:
    """T = P (I + K)^T H from the errors of P H, brought back by H. Signals are computed as the
    method does, so that no value beside a rounding cut falls on its other side."""
    p = ABLATION[0].fit(site, 0).matrices @ sylvester(32)
    references = geometry.reference(
        geometry.ridged(input_moments(site)), geometry.ridged(weight_moments(site))
    )
    assert (p - references).abs().max() <= 64 * 32 * EPS
    h = sylvester(32)
    fitted = HiRes(balance=False).fit(site, 0).matrices
    for block, reference in enumerate(references):
        here = slice(32 * block, 32 * block + 32)
        y = site.sample[:, here].double() @ reference
        v = torch.linalg.solve(reference, site.weight[:, here].T).T
        e_x, e_w = (fake_quantize((s @ h).float()).double() @ h - s for s in (y, v))
        k = geometry.interaction(y, v, e_x, e_w)
        g = torch.eye(32, dtype=torch.float64) + k
        expected = reference @ g.T @ h / torch.linalg.det(g) ** (1 / 32)
        assert (fitted[block] - expected).abs().max() <= 64 * 32 * EPS
        assert (reference @ g @ h - expected).abs().max() > 1e-4  # K is not symmetric


def test_balance_never_loses_on_the_sample(site: SiteStatistics) -> None:
    def error(method: HiRes, block: int) -> float:
        transform = method.fit(site, 0)
        here = slice(32 * block, 32 * block + 32)
        x = transform.apply(site.sample.double())[:, here]
        w = transform.fuse(site.weight)[:, here]
        return product_error(
            x, w, fake_quantize(x.float()).double(), fake_quantize(w.float()).double()
        ).item()

    for block in range(3):
        assert error(ABLATION[1], block) <= error(ABLATION[0], block) * (1 + 1e-12)
    assert not torch.equal(ABLATION[1].fit(site, 0).matrices, ABLATION[0].fit(site, 0).matrices)


def test_product_error_is_the_squared_norm(site: SiteStatistics) -> None:
    x, w = site.sample.double()[:, :32], site.weight[:, :32]
    x_rounded, w_rounded = (fake_quantize(side.float()).double() for side in (x, w))
    dense = (x_rounded @ w_rounded.T - x @ w.T).square().sum()
    # The Gram form subtracts squares of the size of the output itself.
    bound = 64 * 500 * EPS * (x.norm() * w.norm()) ** 2
    assert (product_error(x, w, x_rounded, w_rounded) - dense).abs() <= bound


def test_the_scale_rule_matters(site: SiteStatistics) -> None:
    floor, rceil = (
        HiRes(scale=rule).fit(site, 0).matrices for rule in (ScaleRule.FLOOR, ScaleRule.RCEIL)
    )
    assert not torch.equal(floor, rceil)


@pytest.mark.parametrize("empty", ["inputs", "weights", "both"])
def test_a_block_of_zeros_is_fitted(empty: str) -> None:
    rows, weight = oracles.activations(100, 64, outliers=2, seed=3), random_weight(50, 64, seed=4)
    if empty != "weights":
        rows[:, :32] = 0
    if empty != "inputs":
        weight[:, :32] = 0
    matrices = HiRes().fit(oracles.site(rows, weight), 0).matrices
    assert torch.isfinite(matrices).all()
    if empty == "both":
        assert (matrices[0] - sylvester(32)).abs().max() <= 32 * 32 * EPS


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ABLATION, ids=str)
def test_it_loses_less_than_identity_and_hadamard(method: HiRes, seed: int) -> None:
    """Of W4A4 products with round-to-nearest weights, on tokens that it was not fitted to."""
    rows, weight = correlated(1536, 256, seed), random_weight(96, 256, seed + 100)
    train, test = rows[:1024], rows[1024:]
    exact = test.double() @ weight.double().T

    def error(other: TransformMethod) -> float:
        transform = other.fit(oracles.site(train, weight), 0)
        x = fake_quantize(transform.apply(test)).double()
        w = fake_quantize(transform.fuse(weight.double()).float()).double()
        return ((x @ w.T - exact).square().sum() / exact.square().sum()).item()

    assert error(method) < min(error(IdentityMethod()), error(Hadamard()))
