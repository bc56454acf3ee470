"""The critical-angle solver against brute force, and Algorithm 2's promises."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.transforms.torq.intra_block import (
    best_angle,
    counts,
    maximize_entropy,
    occupancy_loss,
    select_pairs,
)

OPTIONS = {
    "s_step": ScaleRule.FLOOR6,
    "rounds": 10,
    "top": 16,
    "pairs": 8,
    "complementarity": 1.0,
    "tolerance": 1e-5,
}


def columns(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    u, v = draw.standard_normal(n) * draw.uniform(0.2, 5), draw.standard_normal(n)
    return u, v + draw.uniform(-1, 1) * u


@pytest.mark.parametrize("seed", range(12))
def test_no_angle_of_a_fine_grid_is_better(seed: int) -> None:
    u, v = columns(40, seed)
    found = oracles.pair_squares(u, v, best_angle(u, v))
    grid = min(oracles.pair_squares(u, v, t) for t in np.linspace(0, math.pi / 2, 700))
    assert found <= grid


def every_interval(u: np.ndarray, v: np.ndarray) -> int:
    """The best objective over all intervals, by listing critical angles one by one."""
    angles = [0.0, math.pi / 2]
    for r, phi in zip(np.hypot(u, v), np.arctan2(v, u), strict=True):
        for cut in oracles.CUTS:
            if r > cut:
                for base in (0.0, math.pi / 2):
                    for sign in (1, -1):
                        for turn in range(-3, 4):
                            t = base - phi + sign * math.acos(cut / r) + turn * math.pi
                            if 0 <= t <= math.pi / 2:
                                angles.append(t)
    angles.sort()
    middles = [(a + b) / 2 for a, b in pairwise(angles) if b - a > 1e-9]
    return min([oracles.pair_squares(u, v, t) for t in middles] + [oracles.pair_squares(u, v, 0)])


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_exact_optimum(seed: int) -> None:
    u, v = columns(25, 100 + seed)
    assert oracles.pair_squares(u, v, best_angle(u, v)) == every_interval(u, v)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            *[st.sampled_from([0.0, 0.25, -0.75, 1.25, 2.5, -3.5, 5.0, 6.0, -12.0, 0.3])] * 2
        ),
        min_size=1,
        max_size=12,
    )
)
def test_samples_on_cuts_and_zeros(pairs: list[tuple[float, float]]) -> None:
    """Values exactly on a rounding cut make events at 0 and at 90 degrees."""
    u, v = (np.array(column) for column in zip(*pairs, strict=True))
    theta = best_angle(u, v)
    assert 0 <= theta < math.pi / 2
    assert oracles.pair_squares(u, v, theta) == every_interval(u, v)


def test_the_period_is_a_quarter_turn() -> None:
    u, v = columns(60, 5)
    for theta in np.linspace(0.01, 1.5, 40):
        quarter = oracles.pair_squares(u, v, theta + math.pi / 2)
        assert quarter == oracles.pair_squares(u, v, theta)


def test_counts_and_loss_against_the_definition() -> None:
    z = np.random.default_rng(1).standard_normal((200, 5)) * 3
    z[:7, 0] = oracles.CUTS
    expected = np.stack([oracles.occupancy(column) for column in z.T])
    assert (counts(np.abs(z)) == expected).all()
    loss = ((expected / 200 - 0.125) ** 2).sum(-1)
    assert np.allclose(occupancy_loss(expected), loss, rtol=1e-15)


def test_pair_selection_is_the_paper_s_score() -> None:
    draw = np.random.default_rng(2)
    count = draw.multinomial(1000, draw.dirichlet(np.ones(8), 32)[0], size=32)
    chosen = select_pairs(count, top=16, pairs=8, complementarity=1.0)
    assert len(chosen) == 8
    assert len({column for pair in chosen for column in pair}) == 16
    p = count / 1000 - 0.125
    h = (p**2).sum(-1)
    worst = set(np.argsort(-h, kind="stable")[:16].tolist())
    assert all(set(pair) <= worst for pair in chosen)
    score = {(k, m): h[k] + h[m] - p[k] @ p[m] for k in worst for m in worst if k != m}
    assert math.isclose(score[chosen[0]], max(score.values()), rel_tol=1e-12)


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR6, ScaleRule.FLOOR])
def test_the_loss_never_rises_and_the_best_rotation_is_returned(rule: ScaleRule) -> None:
    blocks = oracles.activations(2048, 32, outliers=3, seed=4)
    fit = maximize_entropy(blocks, **{**OPTIONS, "s_step": rule})
    rotation = fit.rotation.numpy()
    assert min(fit.losses) <= fit.losses[0]
    assert np.abs(rotation.T @ rotation - np.eye(32)).max() <= 1e-14

    def loss(r: np.ndarray) -> float:
        y = blocks.double().numpy() @ r
        exponent = np.floor(np.log2(np.abs(y).max(1) / 6))
        if rule is ScaleRule.FLOOR:
            exponent = np.floor(np.log2(np.abs(y).max(1))) - 2
        z = np.abs(y) / np.exp2(exponent)[:, None]
        return float(occupancy_loss(counts(z)).sum())

    # The returned rotation was cleaned of rounding: a sample on a cut may change its bin.
    assert math.isclose(loss(rotation), min(fit.losses), rel_tol=1e-3)
    assert math.isclose(loss(np.eye(32)), fit.losses[0], rel_tol=1e-3)


def test_outliers_make_it_work_and_the_same_input_gives_the_same_rotation() -> None:
    blocks = oracles.activations(2048, 32, outliers=3, seed=4)
    one, two = (maximize_entropy(blocks, **OPTIONS) for _ in range(2))
    assert torch.equal(one.rotation, two.rotation)
    assert min(one.losses) < 0.8 * one.losses[0]


def test_zero_blocks_and_constant_columns_do_not_break_it() -> None:
    fit = maximize_entropy(torch.zeros(64, 32), **OPTIONS)
    assert torch.equal(fit.rotation, torch.eye(32, dtype=torch.float64))
    fit = maximize_entropy(torch.ones(64, 32), **OPTIONS)
    assert np.isfinite(fit.losses).all()
