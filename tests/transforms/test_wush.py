"""WUSH attains the minimum that its paper promises, and lowers the error of W4A4 products."""

import pytest
import torch

import oracles
from mxtorq.errors import UsageError
from mxtorq.formats.mxfp4 import fake_quantize
from mxtorq.transforms.base import SiteStatistics, Transform, TransformMethod
from mxtorq.transforms.hadamard import Hadamard, sylvester
from mxtorq.transforms.rotation import IdentityMethod
from mxtorq.transforms.wush import (
    WUSH,
    Curvature,
    conditional_moments,
    damped,
    diagonal_blocks,
    equalize_moments,
    input_moments,
    weight_moments,
)

EPS = torch.finfo(torch.float64).eps


def correlated(tokens: int, width: int, seed: int, outliers: int = 6) -> torch.Tensor:
    """Inputs that share a quarter as many factors as there are channels, with some outliers."""
    draw = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, width // 4, generator=draw) * torch.linspace(2, 0.3, width // 4)
    mixed = factors @ torch.randn(width // 4, width, generator=draw) / (width // 4) ** 0.5
    rows = mixed + 0.3 * torch.randn(tokens, width, generator=draw)
    where = torch.randperm(width, generator=draw)[:outliers]
    rows[:, where] *= 10 + 30 * torch.rand(outliers, generator=draw)
    return rows


def random_weight(outputs: int, width: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    columns = torch.exp(0.5 * torch.randn(width, generator=draw))
    return 0.02 * torch.randn(outputs, width, generator=draw) * columns


@pytest.fixture(scope="module")
def site() -> SiteStatistics:
    weights = random_weight(48, 128, seed=2), random_weight(16, 128, seed=3)
    return oracles.site(correlated(400, 128, seed=1), *weights)


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def product_of_traces(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    inverse = torch.linalg.inv(t)
    return (torch.trace(t.T @ a @ t) * torch.trace(inverse @ b @ inverse.T)).item()


def test_both_second_moments_become_the_same_and_their_diagonals_constant(
    site: SiteStatistics,
) -> None:
    """Of the damped moments. Relative to the largest entry the error is that of products of 32
    terms, times the condition of T on either side."""
    a = damped(input_moments(site), 0.01)
    b = damped(weight_moments(site), 0.01)
    t = WUSH().fit(site, 0).matrices
    inverse = torch.linalg.inv(t)
    of_inputs, of_weights = t.mT @ a @ t, inverse @ b @ inverse.mT
    bound = 100 * 32 * EPS * torch.linalg.cond(t).max() ** 2 * of_inputs.abs().max()
    assert (of_inputs - of_weights).abs().max() <= bound
    diagonal = of_inputs.diagonal(dim1=-2, dim2=-1)
    assert (diagonal - diagonal.mean(-1, keepdim=True)).abs().max() <= bound

    hadamard = sylvester(32)
    inner = hadamard @ of_inputs @ hadamard  # diag(S)
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() <= bound
    plain = WUSH(hadamard=False).fit(site, 0).matrices
    assert (plain.mT @ a @ plain - inner).abs().max() <= bound
    assert inner[0, 0, 0] > 10 * inner[0, 31, 31]  # WUS does not equalise


def test_it_is_the_formula_of_the_paper(site: SiteStatistics) -> None:
    """T^T = H diag(S^1/2) V^T U^-T, with U and S of the tall product U W^T / sqrt(d_out).

    Signs and order of singular vectors are free, so T T^T is compared; B is not damped there, which
    a tiny damping of ours allows for: it moves B, and T T^T at the most by that times cond(B).
    """
    a = damped(input_moments(site), 1e-6)
    t = WUSH(damping=1e-6).fit(site, 0).matrices
    for block in range(4):
        weight = site.weight[:, 32 * block : 32 * (block + 1)]
        upper = torch.linalg.cholesky(a[block], upper=True)
        v, s, _ = torch.linalg.svd(upper @ weight.T / len(weight) ** 0.5, full_matrices=False)
        paper = sylvester(32) @ torch.diag(s.sqrt()) @ v.T @ torch.linalg.inv(upper).T
        condition = torch.linalg.cond(weight.T @ weight).item()
        bound = 32 * 1e-6 * condition * (paper.T @ paper).norm()
        assert (t[block] @ t[block].T - paper.T @ paper).norm() <= bound
        assert bound < 0.05 * (paper.T @ paper).norm()


def test_the_product_of_traces_is_the_minimum(site: SiteStatistics) -> None:
    """min over T of tr(T^T A T) tr(T^-1 B T^-T) = (tr (A^1/2 B A^1/2)^1/2)^2.

    With X = A^1/2 T and Y = B^1/2 T^-T, the traces are |X|^2 and |Y|^2 and X Y^T = A^1/2 B^1/2 for
    every T. Cauchy-Schwarz for the nuclear norm, |X Y^T|_* <= |X| |Y|, gives
    |X|^2 |Y|^2 >= |A^1/2 B^1/2|_*^2, and |M|_* = tr (M M^T)^1/2. WUSH has both traces equal to
    tr S with S the singular values of U L, which are those of A^1/2 B^1/2: it attains the bound.
    """
    a = damped(input_moments(site), 0.01)[1]
    b = damped(weight_moments(site), 0.01)[1]
    t = WUSH().fit(site, 0).matrices[1]
    closed_form = torch.trace(root(root(a) @ b @ root(a))).item() ** 2
    attained = product_of_traces(t, a, b)
    # Square roots of eigenvalues that are small against the largest: half of the digits.
    assert attained == pytest.approx(closed_form, rel=32 * EPS**0.5)

    draw = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(5):
            noise = torch.randn(32, 32, dtype=torch.float64, generator=draw)
            other = t + size * t.norm() / 32 * noise
            assert product_of_traces(other, a, b) >= attained * (1 - 1e-12)
    for other in (torch.eye(32, dtype=torch.float64), sylvester(32), oracles.spd(32, 9.0, 5)):
        assert product_of_traces(other, a, b) > 1.5 * attained


@pytest.mark.parametrize("curvature", list(Curvature))
def test_products_are_kept(site: SiteStatistics, curvature: Curvature) -> None:
    """x T T^-1 w^T: the rounding of sums of 32 terms, times the condition of a block's matrix."""
    transform = WUSH(curvature=curvature).fit(site, 0)
    x, w = site.sample.double(), site.weight
    condition = torch.linalg.cond(transform.matrices).max()
    bound = 4 * 128 * EPS * condition * x.norm(dim=1)[:, None] * w.norm(dim=1)
    assert ((transform.apply(x) @ transform.fuse(w).T - x @ w.T).abs() <= bound).all()


def test_conditional_moments_are_what_earlier_blocks_cannot_explain(site: SiteStatistics) -> None:
    """Least squares: the second moment of the residual of x_b on all channels before it."""
    damping = 0.01
    hessian = damped(site.hessian, damping)
    conditional = conditional_moments(site.hessian, damping)
    own = diagonal_blocks(hessian)
    bound = 128 * EPS * torch.linalg.cond(hessian) * hessian.abs().max()
    for block in range(4):
        at = 32 * block
        cross = hessian[:at, at : at + 32]
        explained = cross.T @ torch.linalg.solve(hessian[:at, :at], cross)
        assert (conditional[block] - (own[block] - explained)).abs().max() <= bound
    assert (conditional[0] - own[0]).abs().max() <= bound
    assert torch.trace(conditional[3]) < 0.9 * torch.trace(own[3])


def test_diagonal_blocks_and_moments_are_their_definitions(site: SiteStatistics) -> None:
    hessian, weight = site.hessian, site.weight
    b = weight_moments(site)
    for block in range(4):
        here = slice(32 * block, 32 * block + 32)
        assert torch.equal(diagonal_blocks(hessian)[block], hessian[here, here])
        moment = weight[:, here].T @ weight[:, here] / 64
        assert (b[block] - moment).abs().max() <= 64 * EPS * b.abs().max()
    assert torch.equal(
        damped(b, 0.5)[0],
        b[0] + 0.5 * b[0].diagonal().mean() * torch.eye(32, dtype=torch.float64),
    )


def test_inputs_or_weights_that_are_zero_get_what_fits_the_other() -> None:
    rows = correlated(200, 96, seed=4)
    rows[:, :32] = 0
    weight = random_weight(40, 96, seed=5)
    weight[:, :64] = 0
    matrices = WUSH().fit(oracles.site(rows, weight), 0).matrices
    assert torch.isfinite(matrices).all()
    # Both zero: T T^T = I, H up to the order and the signs of its rows.
    square = matrices[0] @ matrices[0].T
    assert (square - torch.eye(32, dtype=torch.float64)).abs().max() <= 32 * 32 * EPS
    a = damped(input_moments(oracles.site(rows, weight)), 0.01)[1]
    fitted = equalize_moments(a[None], torch.eye(32, dtype=torch.float64)[None])[0] @ sylvester(32)
    assert (matrices[1] - fitted).abs().max() <= 32 * 32 * EPS * fitted.norm()


def test_fewer_outputs_than_channels_of_a_block() -> None:
    """B is singular then; damping carries it."""
    few = oracles.site(correlated(200, 64, seed=6), random_weight(8, 64, seed=7))
    matrices = WUSH().fit(few, 0).matrices
    assert torch.linalg.cond(matrices).max() < 1e3


def output_error(transform: Transform, rows: torch.Tensor, weight: torch.Tensor) -> float:
    """Squared error of the W4A4 product with round-to-nearest weights, relative to the output."""
    exact = rows.double() @ weight.double().T
    x = fake_quantize(transform.apply(rows))
    w = fake_quantize(transform.fuse(weight.double()).float())
    return ((x.double() @ w.double().T - exact).square().sum() / exact.square().sum()).item()


@pytest.mark.parametrize("seed", range(3))
def test_it_loses_less_than_identity_and_hadamard(seed: int) -> None:
    """On tokens that it was not fitted to. The Hadamard is what makes it: WUS alone leaves the
    largest channel of a block alone with its scale."""
    rows = correlated(2048, 256, seed)
    train, test = rows[:1024], rows[1024:]
    weight = random_weight(96, 256, seed + 100)

    def error(method: TransformMethod) -> float:
        return output_error(method.fit(oracles.site(train, weight), 0), test, weight)

    wush = error(WUSH())
    assert wush < 0.5 * min(error(IdentityMethod()), error(Hadamard()))
    assert wush < error(WUSH(hadamard=False))


@pytest.mark.parametrize("seed", range(3))
def test_rounded_inputs_want_the_curvature_of_the_block(seed: int) -> None:
    """And so the default. Nothing compensates for the rounding of inputs."""
    rows = correlated(2048, 256, seed, outliers=0)
    train, test = rows[:1024], rows[1024:]
    weight = random_weight(96, 256, seed + 100)
    block, conditional = (
        output_error(WUSH(curvature=curvature).fit(oracles.site(train, weight), 0), test, weight)
        for curvature in (Curvature.BLOCK, Curvature.CONDITIONAL)
    )
    assert block < conditional


@pytest.mark.parametrize("damping", [0.0, -1.0, 2.0, float("nan")])
def test_damping_is_checked_at_birth(damping: float) -> None:
    with pytest.raises(UsageError, match="damping"):
        WUSH(damping=damping)
