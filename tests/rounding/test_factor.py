"""The factor against its definition: it is that of the damped Hessian, in the order of rounding."""

import pytest
import torch

import oracles
from mxtorq.errors import FormatError
from mxtorq.rounding.factor import factorize, factorize_

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
@pytest.mark.parametrize("width", [64, 320])
def test_it_is_the_factor_of_the_damped_hessian(order: str, width: int) -> None:
    """320 columns: more rows than are turned to float32 at once, and a last part that is shorter.

    Cholesky is off by (d + 1) eps of the root of the product of diagonals; a float32 entry by eps,
    in each of the two factors.
    """
    moment = oracles.spd(width, 1e4, seed=1)
    moment[5], moment[:, 5] = 0.0, 0.0
    orders = {
        "forward": torch.arange(width),
        "backward": torch.arange(width).flip(0),
        "random": torch.randperm(width, generator=torch.Generator().manual_seed(2)),
    }
    factor = factorize(moment, orders[order], 0.01)
    ordered = moment[factor.order][:, factor.order]
    unseen = int((factor.order == 5).nonzero())
    added = torch.full((width,), 0.01, dtype=torch.float64) * moment.diagonal().mean()
    added[unseen] += 1.0
    damped = ordered + added.diag()
    assert torch.allclose(factor.added, added, rtol=width * EPS64 * 1e3)
    assert torch.equal(factor.diagonal, ordered.diagonal() + factor.added)
    root = factor.pull.T.double() * factor.pivots
    assert torch.equal(root, root.triu())
    assert torch.equal(factor.pull.diagonal(), torch.ones(width))
    size = damped.diagonal().sqrt()
    bound = ((width + 1) * EPS64 * 2 + 2 * EPS32) * size[:, None] * size
    assert ((root @ root.T - damped).abs() <= bound).all()


def test_it_says_whether_it_is_of_all_moments() -> None:
    moment = oracles.spd(64, 1.0, seed=1)
    assert factorize(moment, torch.arange(64), 0.01).complete
    moment[7, 7] = 0.0  # and the rest of its row is not
    assert not factorize(moment, torch.arange(64), 0.01).complete
    moment[7], moment[:, 7] = 0.0, 0.0
    assert factorize(moment, torch.arange(64), 0.01).complete


@pytest.mark.parametrize("width", [64, 1056])
def test_in_place_is_the_same(width: int) -> None:
    """And takes no other matrix of that size in float64: the factor lies where the Hessian lay."""
    moment = oracles.spd(width, 1e4, seed=1)
    moment[5], moment[:, 5] = 0.0, 0.0
    order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
    before = moment.clone()
    expected = factorize(moment, order, 0.01)
    assert torch.equal(moment, before)
    found = factorize_(moment, order, 0.01)
    assert all(
        torch.equal(*map(torch.as_tensor, pair)) for pair in zip(found, expected, strict=True)
    )
    lower = moment.T  # in the reverse order
    assert torch.equal(lower, lower.tril())
    assert torch.equal(lower.diagonal().flip(0), found.pivots)


def test_follow_is_that_of_the_inverse() -> None:
    """U_jk / U_jj with H^-1 = U^T U from torch, for the diagonal blocks."""
    moment = oracles.spd(96, 10.0, seed=3)
    factor = factorize(moment, torch.arange(96), 0.01)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(96)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    upper = upper / upper.diagonal()[:, None]
    # An inverse and two factors, each off by d eps times the condition number.
    bound = 3 * 96 * EPS64 * torch.linalg.cond(damped) + EPS32
    for at in range(3):
        here = slice(32 * at, 32 * at + 32)
        difference = (factor.follow[at].double() - upper[here, here]).abs()
        assert (difference <= bound * upper.abs().max()).all()


def test_a_matrix_is_turned_into_its_columns() -> None:
    matrix = torch.randn(5, 64)
    for order in (torch.arange(64), torch.randperm(64)):
        columns = factorize(oracles.spd(64, 1.0, seed=1), order, 0.01).columns(matrix)
        assert torch.equal(columns, matrix.T[order])
        assert columns.is_contiguous()


def test_a_matrix_without_a_factor_is_refused() -> None:
    with pytest.raises(FormatError, match=r"a larger damping, such as 0\.1"):
        factorize(-oracles.spd(64, 1.0, seed=1), torch.arange(64), 0.01)
