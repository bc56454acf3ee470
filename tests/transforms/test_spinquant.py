"""SpinQuant: Cayley SGD against textbook formulae and a known optimum, then a tiny model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tiny_models
from mxtorq.errors import ModelError, UsageError
from mxtorq.models.family import SiteName
from mxtorq.surgery.network import network as real_network
from mxtorq.transforms import METHODS
from mxtorq.transforms.base import Network, NetworkShape, OfflineRotations, Transform
from mxtorq.transforms.quarot import full_hadamard
from mxtorq.transforms.rotation import require_orthogonal
from mxtorq.transforms.spinquant import SpinQuant, cayley_step, nearest_orthogonal
from tiny_models import FAMILIES

HIDDEN, HEAD = 16, 8
EPS = torch.finfo(torch.float64).eps
Loss = Callable[[Tensor, list[Tensor], Mapping[SiteName, Transform], list[int]], Tensor]


def random(seed: int, *size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(seed, size, size)).Q


def network(loss: Loss, windows: int = 5) -> Network:
    sites = dict.fromkeys(SiteName, HIDDEN) | {SiteName.DOWN_IN: 96}
    return Network(shape=NetworkShape(HIDDEN, 2, 2, HEAD, 2, sites), windows=windows, loss=loss)


def matrices(rotations: OfflineRotations) -> list[Tensor]:
    assert rotations.residual is not None
    return [rotation.matrix() for rotation in (rotations.residual, *rotations.heads)]


def test_it_is_in_the_table() -> None:
    assert METHODS["spinquant"] is SpinQuant


@pytest.mark.parametrize("rate", [0.01, 10.0])
def test_a_step_is_the_cayley_transform(rate: float) -> None:
    """R Q with Q = (I - a/2 W)(I + a/2 W)^-1 by explicit inverse; every matrix here is of norm
    and condition below 2, so rounding is some n eps."""
    start, gradient = orthogonal(HIDDEN, 0), random(1, HIDDEN, HIDDEN)
    w = (start.T @ gradient - gradient.T @ start) / 2
    a = min(rate, 1 / w.abs().sum(0).max().item())
    assert (a < rate) == (rate == 10.0)  # one of the two is cut
    eye = torch.eye(HIDDEN, dtype=torch.float64)
    expected = start @ (eye - a / 2 * w) @ torch.linalg.inv(eye + a / 2 * w)
    found = cayley_step(start, gradient, rate)
    assert (found - expected).abs().max() <= 16 * HIDDEN * EPS
    assert (found.T @ found - eye).abs().max() <= 16 * HIDDEN * EPS


def test_a_step_goes_down_along_the_rotations() -> None:
    """For small a: R' = R - a R W + O(a^2 |W|^2), and <G, R W> = |W|^2 in the Frobenius norm."""
    start, gradient = orthogonal(HIDDEN, 2), random(3, HIDDEN, HIDDEN)
    w = (start.T @ gradient - gradient.T @ start) / 2
    a = 1e-4
    change = cayley_step(start, gradient, a) - start
    assert (change + a * start @ w).norm() <= (a * w.norm()) ** 2
    assert ((gradient * change).sum() + a * w.norm() ** 2).abs() <= (
        a * w.norm()
    ) ** 2 * gradient.norm()


def test_without_a_tangent_gradient_it_stays() -> None:
    start = orthogonal(HIDDEN, 4)
    symmetric = torch.eye(HIDDEN, dtype=torch.float64)
    assert (cayley_step(start, start @ symmetric, 1.5) - start).abs().max() <= 8 * HIDDEN * EPS


def test_nearest_orthogonal_is_the_polar_factor() -> None:
    """Q P with P positive definite has the orthogonal factor Q."""
    q, root = orthogonal(HIDDEN, 5), random(6, HIDDEN, HIDDEN)
    spd = root @ root.T / HIDDEN + torch.eye(HIDDEN, dtype=torch.float64)
    found = nearest_orthogonal(q @ spd)
    assert (found - q).abs().max() <= 8 * HIDDEN * EPS * torch.linalg.cond(spd)


def test_it_finds_the_optimum_of_a_procrustes_problem() -> None:
    """max tr(R^T A) over orthogonal R is the sum of A's singular values, at its polar factor. With
    A = Q P, Q in the component of the start (steps keep det R), all 3 matrices must get there."""
    start = matrices(SpinQuant(steps=0).rotations(network(lambda *_: torch.tensor(0.0)), seed=7))
    targets = []
    for at, first in enumerate(start):
        size = len(first)
        skew = random(10 + at, size, size)
        q = first @ torch.linalg.matrix_exp((skew - skew.T) / 4)
        root = random(20 + at, size, size)
        targets.append(q @ (torch.eye(size, dtype=torch.float64) + root @ root.T / size) / 2)

    def loss(
        residual: Tensor, heads: list[Tensor], online: Mapping[SiteName, Transform], _: list[int]
    ) -> Tensor:
        pairs = zip([residual, *heads], targets, strict=True)
        return -torch.stack([(r * target).sum() for r, target in pairs]).sum()

    best = sum(torch.linalg.svdvals(target).sum().item() for target in targets)
    learned = SpinQuant(steps=200).rotations(network(loss), seed=7)
    found = matrices(learned)
    before, after = (-loss(m[0], m[1:], {}, []).item() for m in (start, found))
    assert best * (1 + 8 * HIDDEN * EPS) >= after > best - 1e-4 * (best - before)
    for rotation, target in zip(found, targets, strict=True):
        require_orthogonal(rotation, "block-rotation")
        assert (rotation - nearest_orthogonal(target)).abs().max() < 0.01


def test_it_starts_from_random_hadamards() -> None:
    rotations = SpinQuant(steps=0).rotations(network(lambda *_: torch.tensor(0.0)), seed=1)
    for rotation, size in zip(matrices(rotations), (HIDDEN, HEAD, HEAD), strict=True):
        assert (rotation.abs() - 1 / math.sqrt(size)).abs().max() <= 4 * EPS
    assert not torch.equal(matrices(rotations)[1], matrices(rotations)[2])


def test_it_shows_each_window_once_a_round_and_lowers_the_rate_linearly() -> None:
    seen: list[list[int]] = []
    sites: set[SiteName] = set()
    norms: list[float] = []
    last: list[Tensor] = []

    def loss(
        residual: Tensor, heads: list[Tensor], online: Mapping[SiteName, Transform], at: list[int]
    ) -> Tensor:
        seen.append(at)
        sites.update(online)
        if last:
            norms.append((residual - last[0]).norm().item())
        last[:] = [residual.detach().clone()]
        # A gradient R K with K skew and constant: every step turns by the angle of its rate.
        return (residual * (residual.detach() @ turn)).sum() + sum(h.sum() for h in heads) * 0

    turn = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
    turn[0, 1], turn[1, 0] = 0.01, -0.01
    SpinQuant(steps=10, learning_rate=1.0).rotations(network(loss), seed=3)
    assert [sorted(seen[at : at + 5]) for at in (0, 5)] == [[[0], [1], [2], [3], [4]]] * 2
    assert seen[:5] != seen[5:]
    assert sites == {SiteName.DOWN_IN}
    for step, norm in enumerate(norms):  # |R Q - R| = 2 sqrt(2) sin(atan(a/2 |w|)) in one plane
        angle = math.atan(0.01 * (1 - step / 10) / 2)
        assert norm == pytest.approx(2 * math.sqrt(2) * math.sin(angle), rel=1e-9)


def test_a_batch_is_the_mean_of_its_windows() -> None:
    targets = [random(seed, HIDDEN, HIDDEN) / 100 for seed in range(4)]  # small: no step is cut

    def loss(
        residual: Tensor, heads: list[Tensor], online: Mapping[SiteName, Transform], at: list[int]
    ) -> Tensor:
        chosen = torch.stack([targets[index] for index in at]).mean(0)
        return -(residual * chosen).sum()

    start = matrices(SpinQuant(steps=0).rotations(network(loss, windows=4), seed=0))[0]
    found = matrices(SpinQuant(steps=1, batch=4).rotations(network(loss, windows=4), seed=0))
    expected = cayley_step(start, -torch.stack(targets).mean(0), 1.5)
    assert (found[0] - expected).abs().max() <= 16 * HIDDEN * EPS
    assert (found[1].abs() - 1 / math.sqrt(HEAD)).abs().max() <= 8 * HEAD * EPS  # not in the loss


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_model_gets_a_lower_loss(name: str) -> None:
    """Over all windows that it learns from; and the same bits from the same seed."""
    seen = real_network(tiny_models.build(name), FAMILIES[name], tiny_models.tokens(4, 32))
    online: dict[SiteName, Transform] = {SiteName.DOWN_IN: full_hadamard(96)}

    def total(rotations: OfflineRotations) -> float:
        residual, *heads = matrices(rotations)
        return seen.loss(residual, heads, online, [0, 1, 2, 3]).item()

    method = SpinQuant(steps=12, batch=2)
    method.check(seen.shape)
    learned = method.rotations(seen, seed=0)
    assert total(learned) < total(SpinQuant(steps=0).rotations(seen, seed=0)) - 0.01
    for rotation in matrices(learned):
        require_orthogonal(rotation, "block-rotation")
    if name == "llama":
        again = matrices(method.rotations(seen, seed=0))
        assert all(map(torch.equal, matrices(learned), again))


def test_a_broken_network_is_an_error() -> None:
    def loss(
        residual: Tensor, heads: list[Tensor], online: Mapping[SiteName, Transform], at: list[int]
    ) -> Tensor:
        return residual.sum() * float("nan")

    with pytest.raises(ModelError, match="nan at step 0") as caught:
        SpinQuant().rotations(network(loss), seed=0)
    assert "evaluate" in caught.value.todo


def test_what_cannot_work_is_refused() -> None:
    for bad in ({"steps": -1}, {"batch": 0}, {"learning_rate": 0.0}, {"learning_rate": math.inf}):
        with pytest.raises(UsageError, match="steps=100"):
            SpinQuant(**bad)
    good = network(lambda *_: torch.tensor(0.0)).shape
    SpinQuant().check(good)
    with pytest.raises(UsageError, match="11008"):
        SpinQuant().check(good._replace(sites={**good.sites, SiteName.DOWN_IN: 11008}))
    with pytest.raises(UsageError, match="no calibration window"):
        SpinQuant().rotations(network(lambda *_: torch.tensor(0.0), windows=0), seed=0)
    with pytest.raises(UsageError, match="nothing to learn"):
        SpinQuant().check(good._replace(sites={SiteName.DOWN_IN: 96}))


def test_progress_counts_steps() -> None:
    calls: list[tuple[int, int]] = []
    seen = replace(
        network(lambda residual, *_: residual.sum()),
        progress=lambda *step: calls.append(step),  # type: ignore[misc]
    )
    SpinQuant(steps=3).rotations(seen, seed=0)
    assert calls == [(1, 3), (2, 3), (3, 3)]
