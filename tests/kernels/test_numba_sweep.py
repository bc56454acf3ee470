"""The sweep by numba finds the angle of the eager one, to the bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.transforms.torq.intra_block import best_angle, counts, maximize_entropy

pytest.importorskip("numba")


def angles(u: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    return best_angle(u, v, backend="eager"), best_angle(u, v, backend="numba")


def columns(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    u, v = draw.standard_normal(n) * draw.uniform(0.2, 5), draw.standard_normal(n)
    return u, v + draw.uniform(-1, 1) * u


@pytest.mark.parametrize("n", [1, 2, 40, 700, 5000, 40_000])
def test_the_angle_is_the_same_to_the_bit(n: int) -> None:
    """40,000 samples: where the eager sweep needs 64-bit counts."""
    found = []
    for seed in range(8 if n <= 700 else 2):
        eager, numba = angles(*columns(n, seed))
        assert eager == numba
        found.append(numba)
    assert any(found) or n == 1


@settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.tuples(*[st.sampled_from([0.0, 0.25, -0.75, 1.25, 2.5, -3.5, 5.0, 6.0, -12.0])] * 2),
        min_size=1,
        max_size=12,
    )
)
def test_samples_on_cuts_and_zeros(pairs: list[tuple[float, float]]) -> None:
    eager, numba = angles(*(np.array(column) for column in zip(*pairs, strict=True)))
    assert eager == numba


@pytest.mark.parametrize("spread", [0.0, 1e-14, 1e-9, 1e-6, 1e-3])
def test_events_that_crowd(spread: float) -> None:
    """Samples all alike up to ``spread`` fall into few buckets, whatever order they come in."""
    draw = np.random.default_rng(int(-math.log10(spread or 1)))
    for size in (20, 300, 4000):
        u, v = 3.1 + spread * draw.standard_normal(size), 1.7 + spread * draw.standard_normal(size)
        u[: size // 8] *= -1
        eager, numba = angles(u, v)
        assert eager == numba
        assert oracles.pair_squares(u, v, numba) <= oracles.pair_squares(u, v, 0.0)


def test_strided_columns_and_columns_without_events() -> None:
    z = np.random.default_rng(3).standard_normal((500, 32)) * 3
    eager, numba = angles(z[:, 4], z[:, 30])
    assert eager == numba != 0.0
    assert angles(np.full(9, 0.1), np.zeros(9)) == (0.0, 0.0)


def test_counts_are_the_same() -> None:
    z = np.abs(np.random.default_rng(1).standard_normal((501, 5)) * 3)
    z[:7, 0] = oracles.CUTS
    z[:7, 1] = np.nextafter(oracles.CUTS, 0)
    z[:7, 2] = np.nextafter(oracles.CUTS, 9)
    z[:3, 3] = np.nan, np.inf, 0.0
    for values in (z, z[::2], z.T.copy().T, z[:1], z[:0]):
        eager, numba = (counts(values, backend=backend) for backend in ("eager", "numba"))
        assert eager.shape == numba.shape == (5, 8)
        assert (eager == numba).all()
    assert (counts(z[:, :3], backend="numba")[0] == oracles.occupancy(z[:, 0])).all()


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR6, ScaleRule.FLOOR])
def test_algorithm_2_is_the_same_to_the_bit(rule: ScaleRule) -> None:
    blocks = oracles.activations(2048, 32, outliers=3, seed=4)
    for rows in (blocks, blocks[:1], torch.zeros(64, 32), torch.ones(64, 32)):
        eager, numba = (
            maximize_entropy(
                rows,
                s_step=rule,
                rounds=4,
                top=16,
                pairs=8,
                complementarity=1.0,
                tolerance=1e-5,
                backend=backend,
            )
            for backend in ("eager", "numba")
        )
        assert torch.equal(eager.rotation, numba.rotation)
        assert eager.losses == numba.losses
