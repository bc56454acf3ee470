"""What descent claims to have gained is true within the bound, and the bound is of use."""

import pytest
import torch

import oracles
from mxtorq.formats import e2m1
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import NonOCPScale, Scale
from mxtorq.kernels.dispatch import dequantize
from mxtorq.rounding import descent
from mxtorq.rounding.fall import Fall, Slopes, slopes_of
from mxtorq.rounding.half import halve
from mxtorq.rounding.rtn import RTN

EPS = torch.finfo(torch.float64).eps


def moments(width: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    few = torch.randn(width // 3, width, dtype=torch.float64, generator=draw)
    unseen = oracles.spd(width, 1e3, seed=6)
    unseen[[0, 40]], unseen[:, [0, 40]] = 0.0, 0.0
    loud = torch.exp2(20 * torch.randn(width, dtype=torch.float64, generator=draw))
    return {
        "plain": oracles.spd(width, 1e2, seed=3),
        "loud": oracles.spd(width, 1e8, seed=4),
        "rank": few.T @ few,
        "ones": torch.ones(width, width, dtype=torch.float64),
        "unseen": unseen,
        "uneven": oracles.spd(width, 1e2, seed=5) * loud[:, None] * loud,
        "tiny": oracles.spd(width, 1e2, seed=5) * 2.0**-200,
    }


@pytest.mark.parametrize("scale", [ScaleRule.FLOOR, NonOCPScale.FOUR_THIRDS])
@pytest.mark.parametrize("kind", list(moments(64)))
def test_the_claim_is_true_within_its_bound(
    kind: str, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fall in float64 has an error of its own: 4 d eps of the sum of magnitudes."""
    moment = moments(160)[kind]
    weight = torch.randn(30, 160, generator=torch.Generator().manual_seed(1))
    weight[3] *= 2.0**-130
    weight[4] *= 2.0**100
    half, start = halve(moment), RTN().round(weight, torch.Tensor, scale)
    kept: list[tuple[Fall, torch.Tensor]] = []
    slack_of = Fall.slack

    def slack(self: Fall, *args: object) -> torch.Tensor:
        found = slack_of(self, *args)
        kept.append((self, found))
        return found

    monkeypatch.setattr(Fall, "slack", slack)
    slopes = slopes_of(half)
    codes, clear = descent.sweep(start, weight, slopes, 3, 64)
    (fall, bound), end = kept[0], start._replace(packed=e2m1.pack(codes))
    step = dequantize(end).double() - dequantize(start)
    errors = dequantize(end).double() + dequantize(start) - 2 * weight.double()
    fell = -half.products(step, errors)
    own = 4 * 160 * EPS * ((step.abs() @ moment.abs()) * errors.abs()).sum(1)
    told = fall.claimed.isfinite()  # slopes of row 4 may leave float32
    assert ((fall.claimed - fell).abs() <= bound + own)[told].all()
    assert int(told.sum()) >= 29
    assert not clear[~told].any()
    assert (fell[clear] > -own[clear]).all()
    if kind in ("plain", "unseen", "uneven"):
        usual = [row for row in range(30) if row not in (3, 4)]
        assert clear[usual].all()


def test_slopes_are_the_hessian_s_rows_over_its_diagonal() -> None:
    """Over more columns than a panel has."""
    moment = oracles.spd(544, 1e2, seed=3)
    moment[7], moment[:, 7] = 0.0, 0.0
    moment = (moment + moment.T) / 2
    found = slopes_of(halve(moment))
    diagonal = moment.diagonal()
    seen = diagonal > 0
    assert torch.equal(found.diagonal, diagonal)
    assert torch.equal(found.pull[seen], (moment[seen] / diagonal[seen, None]).float())
    assert not found.pull[7].any()
    shares = moment.square()[:, seen] / diagonal[seen]
    assert torch.allclose(found.reach, shares.sum(1).sqrt(), rtol=600 * EPS, atol=0.0)


def test_moments_of_a_channel_without_one_of_its_own_leave_all_in_doubt() -> None:
    """Such a matrix is no second moment; nothing is bounded then."""
    moment = oracles.spd(64, 1e2, seed=5)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    start = RTN().round(weight, torch.Tensor, ScaleRule.FLOOR)
    assert descent.sweep(start, weight, slopes_of(halve(moment)), 1, 64)[1].all()
    moment[5], moment[:, 5] = 0.0, 0.0
    moment[5, 9] = moment[9, 5] = 0.01
    slopes = slopes_of(halve(moment))
    assert slopes.reach.isinf().nonzero().flatten().tolist() == [9]
    assert not descent.sweep(start, weight, slopes, 1, 64)[1].any()


def test_an_empty_hessian_claims_nothing() -> None:
    slopes = slopes_of(halve(torch.zeros(64, 64, dtype=torch.float64)))
    assert isinstance(slopes, Slopes)
    nothing = torch.zeros(3, dtype=torch.float64)
    assert Fall(nothing, nothing, nothing, nothing).slack(slopes, 1, 128).isinf().all()
