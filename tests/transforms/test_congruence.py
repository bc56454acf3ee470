"""C^T M C in place, for any width, and the statistics that are made so."""

import pytest
import torch

import oracles
from mxtorq.config import parse_method
from mxtorq.transforms.congruence import congruence_, panels, transpose_

WIDTHS = [1, 31, 512, 1056]  # less than a panel, one, and two with a shorter third


@pytest.mark.parametrize("width", WIDTHS)
def test_a_matrix_is_transposed_where_it_is(width: int) -> None:
    matrix = torch.randn(width, width, dtype=torch.float64)
    expected, place = matrix.T.clone(), matrix.data_ptr()
    transpose_(matrix)
    assert torch.equal(matrix, expected)
    assert matrix.data_ptr() == place


@pytest.mark.parametrize("width", WIDTHS)
def test_both_sides_are_changed(width: int) -> None:
    """With an order of columns, so that the result is exact; M is not symmetric."""
    matrix = torch.randn(width, width, dtype=torch.float64)
    order = torch.randperm(width)
    expected = matrix.T[order][:, order]
    congruence_(matrix, lambda rows: rows[:, order])
    assert torch.equal(matrix, expected)
    again = matrix.clone()
    congruence_(again, lambda rows: rows)  # a change that gives the rows themselves
    assert torch.equal(again, matrix.T)


def test_panels_are_all_rows() -> None:
    for width in (0, *WIDTHS):
        rows = torch.arange(width)
        assert torch.equal(torch.cat([rows[:0], *(rows[here] for here in panels(width))]), rows)


@pytest.mark.parametrize(
    "spec", ["identity", "hadamard", "torq", "duquant++:steps=2", "wush", "perq"]
)
def test_statistics_are_changed_in_place_if_they_may_be(spec: str) -> None:
    site = oracles.statistics(1056)
    transform = parse_method(spec).fit(site, seed=0)
    before = site.hessian.clone()
    expected = site.transformed_hessian(transform)
    assert torch.equal(site.hessian, before)
    plain = transform.apply(transform.apply(before).T.contiguous())
    # Two products with T in float64, each entry a sum of at most d terms.
    norm = torch.linalg.matrix_norm(transform.matrix(), 2)
    bound = 4 * len(before) * torch.finfo(torch.float64).eps * norm.square() * before.norm()
    assert (expected - plain).abs().max() <= bound
    found = site.transformed_hessian(transform, overwrite=True)
    assert torch.equal(found, expected)
    assert found.data_ptr() == site.hessian.data_ptr()


def test_channels_are_rescaled_in_place_if_they_may_be() -> None:
    site = oracles.statistics(96)
    before = site.hessian.clone()
    factors = torch.rand(96, dtype=torch.float64) + 0.5
    expected = site.rescaled(factors)
    assert torch.equal(site.hessian, before)
    assert torch.equal(expected.hessian, before * factors[:, None] * factors)
    found = site.rescaled(factors, overwrite=True)
    assert torch.equal(found.hessian, expected.hessian)
    assert found.hessian.data_ptr() == site.hessian.data_ptr()
    assert torch.equal(found.amax, expected.amax)
