"""What a transform loses, against loops over tokens and rows in float64."""

import pytest
import torch

import oracles
from mxtorq.formats import mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.transforms.base import SiteStatistics, Transform
from mxtorq.transforms.hadamard import Hadamard
from mxtorq.transforms.mxtorq import loss
from mxtorq.transforms.mxtorq.loss import Losses, evenly
from mxtorq.transforms.rotation import IdentityMethod
from mxtorq.transforms.wush import WUSH

METHODS = [IdentityMethod(), Hadamard(), WUSH()]
UNIT = 2.0**-24


def losses_of(seen: SiteStatistics) -> Losses:
    assert seen.judgement is not None
    return Losses(seen, seen.judgement, seen.judgement.gradients)


def squares(left: torch.Tensor, right: torch.Tensor, worth: list[float]) -> tuple[float, float]:
    """The sum over all rows of both of squared products times the second one's worth; and what
    products in float32 may be off by, (d + 2) u of the sum of magnitudes each."""
    total = off = 0.0
    for x in left.double():
        for row, each in zip(right.double(), worth, strict=True):
            product = (x * row).sum().item()
            wrong = (len(x) + 2) * UNIT * (x.abs() * row.abs()).sum().item()
            total += each * product**2
            off += each * (2 * abs(product) * wrong + wrong**2)
    return total, off


def agrees(found: float, above: tuple[float, float], below: tuple[float, float]) -> bool:
    expected = above[0] / below[0]
    bound = expected * (above[1] / max(above[0], 1e-300) + 2 * below[1] / below[0])
    assert bound < 0.01 * expected
    return abs(found - expected) <= bound


def operands(seen: SiteStatistics, transform: Transform) -> tuple[torch.Tensor, torch.Tensor]:
    assert seen.judgement is not None
    values = transform.online(seen.judgement.held_out)
    return values, mxfp4.fake_quantize(values, ScaleRule.EVEN)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_of_inputs(method: WUSH, corrected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are brought back by T^-1 here, where the loss takes the rows of the metric along."""
    for name, most in (("GRADIENTS", 16), ("TOKENS", 48)):
        monkeypatch.setattr(loss, name, most)
    seen = oracles.statistics(64, rows=20)
    seen = oracles.judged(seen, activations=ScaleRule.EVEN, corrected=corrected)
    assert seen.judgement is not None
    transform = method.fit(seen, 0)
    every = len(seen.judgement.held_out)
    assert every > 48
    some = [every * at // 48 for at in range(48)]
    values, rounded = (side[some] for side in operands(seen, transform))
    errors = (rounded - values).double()
    if corrected:
        for block in range(2):
            here = slice(32 * block, 32 * block + 32)
            x = values[:, here].double()
            ridge = 1e-3 * x.square().sum(0).mean()
            wide = torch.cat([x, ridge.sqrt() * torch.eye(32)])
            target = torch.cat([errors[:, here], torch.zeros(32, 32)])
            errors[:, here] -= x @ torch.linalg.lstsq(wide, target).solution
    gradients = seen.judgement.gradients[[200 * at // 16 for at in range(16)]]
    back = errors @ torch.linalg.inv(transform.matrix())
    counted = [1.0] * 16
    # Sums of magnitudes in the basis in which the products are really taken.
    total, _ = squares(back, gradients, counted)
    _, off = squares(errors, transform.fuse(gradients.double()), counted)
    signal = squares(seen.judgement.held_out[some], gradients, counted)
    assert agrees(losses_of(seen).of_inputs(transform), (total, off), signal)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_of_weights(method: WUSH, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "GRADIENTS", 16)
    seen = oracles.judged(oracles.statistics(64, rows=20), activations=ScaleRule.EVEN)
    assert seen.judgement is not None
    transform = method.fit(seen, 0)
    weight = transform.fuse(seen.weight).float()
    wrong = mxfp4.fake_quantize(weight) - weight
    worth = seen.judgement.output_weights
    above = squares(operands(seen, transform)[1], wrong, worth.tolist())
    gradients = seen.judgement.gradients[[200 * at // 16 for at in range(16)]]
    signal = squares(seen.judgement.held_out, gradients, [1.0 / 16] * 16)
    assert agrees(losses_of(seen).of_weights(transform), above, signal)


def test_some_rows_and_columns_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows by what they are worth, columns by their number, and the second moment of those."""
    for name, most in (("GRADIENTS", 16), ("ROWS", 8), ("COLUMNS", 64)):
        monkeypatch.setattr(loss, name, most)
    asked: list[torch.Tensor] = []

    def rounded(weight: torch.Tensor, moment: object) -> torch.Tensor:
        assert callable(moment)
        asked.append(moment())
        return mxfp4.fake_quantize(weight)

    plain = oracles.statistics(160, rows=20)
    seen = oracles.judged(plain, activations=ScaleRule.EVEN, rounded=rounded)
    assert seen.judgement is not None
    transform = Hadamard().fit(seen, 0)
    rows = [40 * at // 8 for at in range(8)]
    columns = [*range(32), *range(64, 96)]  # blocks 0 and 5 // 2
    weight = transform.fuse(seen.weight[rows])[:, columns].float()
    wrong = mxfp4.fake_quantize(weight) - weight
    worth = seen.judgement.output_weights
    scaled = (worth[rows] * (worth.sum() / worth[rows].sum()) * (160 / 64)).tolist()
    above = squares(operands(seen, transform)[1][:, columns], wrong, scaled)
    gradients = seen.judgement.gradients[[200 * at // 16 for at in range(16)]]
    signal = squares(seen.judgement.held_out, gradients, [1.0 / 16] * 16)
    assert agrees(losses_of(seen).of_weights(transform), above, signal)
    whole = plain.transformed_hessian(transform)
    assert torch.equal(asked[0], whole[columns][:, columns])


def test_rows_that_are_worth_nothing_are_not_looked_at() -> None:
    """As those of experts that nobody goes to: the one row that is worth something stands for
    itself, wherever it is."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * loss.ROWS + 7, 64, generator=draw)
    worth = torch.zeros(len(weight), dtype=torch.float64)
    worth[5] = 0.5
    rows = oracles.activations(200, 64, outliers=2, seed=1)
    seen = oracles.judged(oracles.site(rows, weight), output_weights=worth)
    alone = oracles.judged(oracles.site(rows, weight[5:6]), output_weights=worth[5:6])
    transform = Hadamard().fit(seen, 0)
    assert losses_of(seen).of_weights(transform) == losses_of(alone).of_weights(transform) > 0
    nothing = oracles.judged(oracles.site(rows, weight), output_weights=0 * worth)
    assert losses_of(nothing).of_weights(transform) == 0


def test_what_is_corrected_loses_less() -> None:
    """In one block the least squares of every direction: no more than with no map at all."""
    rows = oracles.activations(300, 32, outliers=1, seed=2)
    weight = torch.randn(32, 32)
    seen = [oracles.judged(oracles.site(rows, weight), corrected=each) for each in (False, True)]
    plain, corrected = (losses_of(each).of_inputs(IdentityMethod().fit(each, 0)) for each in seen)
    assert 0 < corrected < plain


@pytest.mark.parametrize("what", ["held_out", "gradients"])
def test_inputs_that_do_nothing_lose_nothing(what: str) -> None:
    seen = oracles.statistics(64, rows=20)
    seen = oracles.judged(seen, **{what: torch.zeros(10, 64)})
    losses, transform = losses_of(seen), Hadamard().fit(seen, 0)
    assert losses.of_inputs(transform) == losses.of_weights(transform) == 0


@pytest.mark.parametrize(("total", "most"), [(5, 8), (8, 8), (9, 8), (1000, 7), (0, 4)])
def test_evenly(total: int, most: int) -> None:
    found = evenly(total, most).tolist()
    assert len(found) == min(total, most)
    assert found == [at * total // len(found) for at in range(len(found))]
    assert len(set(found)) == len(found)
