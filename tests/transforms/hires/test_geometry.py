"""Facts about HiRes' reference coordinates, interaction and balance, one block at a time."""

import math

import pytest
import torch

import oracles
from mxtorq.transforms.hires.geometry import (
    RADIUS,
    balance,
    capped,
    interaction,
    reference,
    reference_moment,
    ridged,
    unit_determinant,
)

EPS = torch.finfo(torch.float64).eps
EYE = torch.eye(32, dtype=torch.float64)


def rows(count: int, seed: int, width: int = 32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, dtype=torch.float64, generator=draw)


def moment(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.T @ right / len(left)


@pytest.mark.parametrize("spread", [1.0, 4.0, 1e4])
def test_reference_has_determinant_one_and_a_capped_spectrum(spread: float) -> None:
    p = reference(oracles.spd(32, spread, 1), oracles.spd(32, spread, 2))
    eigenvalues = torch.linalg.eigvalsh(p)
    bound = 100 * 32 * EPS
    assert (p - p.T).abs().max() <= bound
    assert abs(eigenvalues.log().sum().item()) <= bound
    assert eigenvalues.min() >= 8**-0.5 * (1 - bound)
    assert eigenvalues.max() <= 8**0.5 * (1 + bound)


def test_reference_is_the_identity_when_there_is_nothing_to_shape() -> None:
    """A and B^-1 multiples of I."""
    p = reference(7 * EYE, 0.01 * EYE)
    assert (p - EYE).abs().max() <= 32 * EPS


def test_reference_is_symmetric_in_its_two_sides() -> None:
    """Inputs A and weights B ask for what inputs B^-1 and weights A^-1 ask for."""
    a, b = oracles.spd(32, 9.0, 3), oracles.spd(32, 9.0, 4)
    again = reference(torch.linalg.inv(b), torch.linalg.inv(a))
    bound = 100 * 32 * EPS * torch.linalg.cond(a) * torch.linalg.cond(b)
    assert bound < 1e-6
    assert (reference(a, b) - again).abs().max() <= bound


def test_the_moment_of_the_reference_is_a_mean_of_two_that_transform_alike() -> None:
    """M0(T^T A T, T^-1 B T^-T) = T^T M0 T / |det T|^(2/32): a congruence, as for a moment."""
    a, b = oracles.spd(32, 9.0, 3), oracles.spd(32, 9.0, 4)
    t = EYE + rows(32, 5) / 16
    inverse = torch.linalg.inv(t)
    scale = torch.linalg.det(t).abs() ** (2 / 32)
    there = reference_moment(t.T @ a @ t, inverse @ b @ inverse.T)
    here = t.T @ reference_moment(a, b) @ t / scale
    bound = 100 * 32 * EPS * torch.linalg.cond(a) * torch.linalg.cond(b) * torch.linalg.cond(t) ** 2
    assert bound < 1e-6
    assert (there - here).abs().max() <= bound * here.abs().max()


def test_reference_whitens_its_moment_where_the_cap_is_out_of_reach() -> None:
    a = EYE + 0.1 * oracles.spd(32, 4.0, 6)
    b = EYE + 0.1 * oracles.spd(32, 4.0, 7)
    p = reference(a, b)
    assert torch.linalg.cond(p) < 2
    white = p @ reference_moment(a, b) @ p
    bound = 100 * 32 * EPS
    assert (white - white.diagonal().mean() * EYE).abs().max() <= bound


def test_unit_determinant_and_ridge() -> None:
    matrix = 1e-3 * oracles.spd(32, 9.0, 8)
    assert torch.linalg.det(unit_determinant(matrix)).item() == pytest.approx(1, rel=1e-10)
    level = matrix.diagonal().mean()
    assert torch.equal(ridged(matrix), matrix + (0.01 * level + 2.0**-30) * EYE)
    assert torch.linalg.det(unit_determinant(ridged(0 * EYE))).item() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(4))
def test_capped_is_the_projection(seed: int) -> None:
    """Feasible, and no feasible point is nearer: (z - x).(y - x) <= 0 for every feasible z, which
    is what a projection on a convex set means. Clipping and centring in turns gives such z."""
    values = 3 * rows(1, seed)[0]
    x = capped(values, 1.0)
    assert x.abs().max() <= 1
    assert abs(x.sum().item()) <= 32 * 64 * EPS
    for other in range(20):
        z = rows(1, 100 + other)[0]
        for _ in range(200):
            z = (z - z.mean()).clamp(-1, 1)
        z = z - z.mean()
        z = z / z.abs().max().clamp(min=1)
        assert ((z - x) @ (values - x)).item() <= 1e-12


def test_capped_leaves_what_is_allowed() -> None:
    values = torch.linspace(-0.9, 0.9, 32, dtype=torch.float64)
    assert (capped(values, 1.0) - values).abs().max() <= 64 * EPS
    assert (capped(values + 5, 1.0) - values).abs().max() <= 64 * EPS


def frozen_risk(k, x, w, e_x, e_w) -> float:  # type: ignore[no-untyped-def]
    """What `interaction` lowers, with a loop: sum over pairs of each entry's own two squares."""
    c, h = x.square().mean(0), w.square().mean(0)
    total = 0.0
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            if i != j:
                total += (h[i] * (e_x[:, i] - k[i, j] * x[:, j]).square().mean()).item()
                total += (c[j] * (e_w[:, j] + w[:, i] * k[i, j]).square().mean()).item()
    return total


def interaction_by_loops(x, w, e_x, e_w):  # type: ignore[no-untyped-def]
    """The definition, one pair at a time."""
    q = x.shape[1]
    c = [x[:, j].square().mean().item() for j in range(q)]
    h = [w[:, i].square().mean().item() for i in range(q)]

    def contribution(i: int, j: int, side: str, fold: int) -> float:
        if side == "inputs":
            return h[i] * (e_x[fold::2, i] * x[fold::2, j]).mean().item()
        return -c[j] * (w[fold::2, i] * e_w[fold::2, j]).mean().item()

    k = torch.zeros(q, q, dtype=torch.float64)
    for i in range(q):
        for j in range(i + 1, q):
            means, thresholds = [], []
            for sign in (1, -1):
                part = {
                    (side, fold): (
                        contribution(i, j, side, fold) + sign * contribution(j, i, side, fold)
                    )
                    / math.sqrt(2)
                    for side in ("inputs", "weights")
                    for fold in (0, 1)
                }
                even = part["inputs", 0] + part["weights", 0]
                odd = part["inputs", 1] + part["weights", 1]
                of_inputs = (part["inputs", 0] + part["inputs", 1]) / 2
                of_weights = (part["weights", 0] + part["weights", 1]) / 2
                means.append((even + odd) / 2)
                thresholds.append(abs(even - odd) / 2 + abs(of_inputs - of_weights) / 2)
            thresholds[1] += max(abs(means[1]) - abs(means[0]), 0)
            curvature = (2 + 1 / 256) * (h[i] * c[j] + h[j] * c[i]) / 2
            curvature += 2.0**-30 * sum(h) / q * sum(c) / q
            reciprocal, directed = (
                math.copysign(max(abs(mean) - threshold, 0), mean) / curvature
                for mean, threshold in zip(means, thresholds, strict=True)
            )
            k[i, j] = (reciprocal + directed) / math.sqrt(2)
            k[j, i] = (reciprocal - directed) / math.sqrt(2)
    return k * min(1, RADIUS / k.norm().item())


@pytest.mark.parametrize("size", [0.003, 1.0])
def test_interaction_is_its_definition(size: float) -> None:
    """Inside of the ball and outside. Sums of 61 terms, divided by a curvature near 2."""
    x, w, e_w = rows(61, 1, 8), rows(40, 2, 8), rows(40, 4, 8)
    e_x = size * (x @ rows(8, 3, 8) + rows(61, 5, 8))
    e_w = size * (e_w + w @ rows(8, 6, 8))
    slow = interaction_by_loops(x, w, e_x, e_w)
    assert (interaction(x, w, e_x, e_w) - slow).abs().max() <= 4 * 61 * EPS
    assert (slow != slow.T).any()
    assert (slow.norm().item() < RADIUS * 0.99) == (size < 1)


def test_interaction_finds_what_both_sides_and_both_folds_agree_on() -> None:
    """Errors made of a planted K: e_x = y K^T and e_w = -v K, as if codes stood at those of I + K.

    All thresholds but the directed one vanish up to sampling, so signs and the reciprocal parts
    come back, and the risk falls."""
    x, w = rows(4000, 1, 8), rows(4000, 2, 8)
    planted = torch.zeros(8, 8, dtype=torch.float64)
    planted[1, 4] = planted[4, 1] = 0.03
    planted[2, 7] = planted[7, 2] = -0.05
    e_x, e_w = x @ planted.T, -w @ planted
    k = interaction(x, w, e_x, e_w)
    # Sampling moves moments by 1/sqrt(4000) = 1.6 %; ten times that for thresholds and folds.
    assert (k - planted).abs().max() <= 0.16 * 0.05
    assert frozen_risk(k, x, w, e_x, e_w) < frozen_risk(0 * k, x, w, e_x, e_w)
    assert frozen_risk(-k, x, w, e_x, e_w) > frozen_risk(0 * k, x, w, e_x, e_w)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_interaction_is_bounded_has_a_zero_diagonal_and_can_be_inverted(scale: float) -> None:
    """|K|_2 <= |K|_F <= 1/8, so the singular values of I + K lie in [7/8, 9/8]."""
    x, w, e_w = rows(200, 1), rows(90, 2), rows(90, 4)
    e_x = scale * x @ rows(32, 3)
    k = interaction(x, w, e_x, scale * e_w)
    assert (k.diagonal() == 0).all()
    assert k.norm() <= RADIUS * (1 + 4 * EPS)
    assert torch.linalg.cond(EYE + k) <= 9 / 7 * (1 + 1e-12)
    if scale == 1e6:  # far outside of the ball: on its surface
        assert k.norm().item() == pytest.approx(RADIUS)


def test_folds_that_disagree_leave_nothing() -> None:
    """Odd rows with the signals of the even rows and their errors negated, on both sides."""
    x, w = rows(64, 1).repeat_interleave(2, 0), rows(64, 2).repeat_interleave(2, 0)
    e_x, e_w = rows(64, 3).repeat_interleave(2, 0), rows(64, 4).repeat_interleave(2, 0)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(64)[:, None]
    assert (interaction(x, w, signs * e_x, signs * e_w) == 0).all()
    assert (interaction(x, w, e_x, e_w) != 0).any()


def test_without_errors_or_with_one_row_there_is_no_interaction() -> None:
    x, w = rows(20, 1), rows(20, 2)
    assert (interaction(x, w, 0 * x, 0 * w) == 0).all()
    assert (interaction(0 * x, 0 * w, 0 * x, 0 * w) == 0).all()
    assert (interaction(x[:1], w, x[:1], w) == 0).all()


def test_balance_moves_risk_to_the_side_that_has_less() -> None:
    """Larger errors of the inputs in the first half: there u > 0, so that weights shrink."""
    x, w = rows(300, 1), rows(200, 2)
    e_x, e_w = 0.1 * rows(300, 3), 0.1 * rows(200, 4)
    e_x[:, :16] *= 1.2
    u = balance(x, w, e_x, e_w)
    assert (u[:16] > 0).all()
    assert (u[16:] < 0).all()
    assert u.abs().max() <= 1 / 8
    assert abs(u.sum().item()) <= 1e-12
    assert torch.equal(u, u.view(8, 4)[:, :1].expand(8, 4).reshape(32))


def test_balance_minimises_the_risk_of_one_group() -> None:
    """Two groups whose optimum is inside of the limit and symmetric: u = +-log2(a/b)/4."""
    x, w = torch.ones(2, 8, dtype=torch.float64), torch.ones(2, 8, dtype=torch.float64)
    e_x, e_w = x.clone(), w.clone()
    e_x[:, :4] *= 2**0.1  # a/b = 2^0.2 here, 2^-0.2 in the other
    e_w[:, 4:] *= 2**0.1
    u = balance(x, w, e_x, e_w)
    assert (u[:4] - 0.05).abs().max() <= 1e-12
    assert (u[4:] + 0.05).abs().max() <= 1e-12
    a, b = 2**0.2, 1.0

    def risk(v: float) -> float:
        return a * 4**-v + b * 4**v

    assert risk(0.05) < min(risk(0.05 - 1e-3), risk(0.05 + 1e-3))
    assert math.isclose(risk(0.05), 2 * math.sqrt(a * b))


def test_balance_without_risk_is_none() -> None:
    x, w = rows(20, 1), rows(20, 2)
    assert (balance(x, w, 0 * x, w) == 0).all()
