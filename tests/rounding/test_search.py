"""Exponents by their outputs' loss: against conditional minima, each computed by a solve."""

import math

import pytest
import torch

import oracles
from mxtorq.config import parse_rounding
from mxtorq.errors import UsageError
from mxtorq.formats import e2m1, e8m0, reference
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.rounding import ROUNDINGS
from mxtorq.rounding import gptq as module
from mxtorq.rounding.exponents import candidates
from mxtorq.rounding.gptq import GPTQ, GroupScales, Order
from mxtorq.rounding.rtn import RTN
from mxtorq.rounding.search import Search
from mxtorq.specs import options_of, spell
from oracles import rounding_problem

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
OUTPUTS = {"exponents": 3, "search": Search.OUTPUTS}


def group_by_group(
    weight: torch.Tensor, moment: torch.Tensor, order: list[int], rule: ScaleRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of each row alone: the exponent after which the least goal that free weights
    can still reach is smallest."""
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    scales = torch.zeros(len(weight), weight.shape[1] // 32, dtype=torch.float64)
    for row, w in enumerate(weight.double()):
        value, done = w.clone(), []
        for first in range(0, len(order), 32):
            columns = order[first : first + 32]
            amax = float(moved(w, value, done, order[first:], damped)[:32].abs().max())
            byte = reference.scale_byte(amax, rule)
            tried = []
            for scale in (2.0 ** (byte + step - 127) for step in (0, -1, 1)):
                values, found = value.clone(), {}
                for at, column in enumerate(columns):
                    before = done + columns[:at]
                    x = moved(w, values, before, order[first + at :], damped)[0]
                    multiple = float(x) / scale
                    # Weights that moved in float32 may be beyond a cut that is this near.
                    assert all(abs(abs(multiple) - cut) > 1e-5 for cut in oracles.CUTS), "seed"
                    code = sum(abs(multiple) > cut for cut in oracles.CUTS)
                    values[column] = math.copysign(MAGNITUDES[code], multiple) * scale
                    found[column] = code | (8 if multiple < 0 else 0)
                now = done + columns
                error = values.clone() - w
                rest = order[first + 32 :]
                error[rest] = moved(w, values, now, rest, damped) - w[rest]
                tried.append((float(error @ damped @ error), scale, values, found))
            least, second = sorted(each[0] for each in tried)[:2]
            assert second > least * (1 + 1e-5), "choose a seed"
            _, scales[row, columns[0] // 32], value, found = min(tried, key=lambda each: each[0])
            for column, code in found.items():
                codes[row, column] = code
            done += columns
    return codes, scales


def moved(
    w: torch.Tensor, value: torch.Tensor, done: list[int], free: list[int], damped: torch.Tensor
) -> torch.Tensor:
    """Where the free weights are best, given those that are done."""
    if not done or not free:
        return w[free]
    pushed = damped[free][:, done] @ (value - w)[done]
    return w[free] - torch.linalg.solve(damped[free][:, free], pushed)


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.UOS])
@pytest.mark.parametrize("order", [Order.FORWARD, Order.BACKWARD])
def test_each_group_takes_the_exponent_of_the_least_loss(order: Order, rule: ScaleRule) -> None:
    weight, moment = rounding_problem(4, 96)
    columns = list(range(96)) if order is Order.FORWARD else list(reversed(range(96)))
    codes, scales = group_by_group(weight, moment, columns, rule)
    found = GPTQ(order=order, **OUTPUTS).compensated(weight, moment, rule)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1].double(), scales)
    by_values = GPTQ(order=order, exponents=3).compensated(weight, moment, rule)
    assert not torch.equal(by_values[1], found[1])


@pytest.mark.parametrize("rule", list(ScaleRule))
@pytest.mark.parametrize("order", [Order.FORWARD, Order.BACKWARD])
def test_without_correlations_both_searches_are_one(order: Order, rule: ScaleRule) -> None:
    """A tie is the rule's: zeros, of either sign, and numbers at both ends of the range too."""
    weight, _ = rounding_problem(8, 64, seed=5)
    weight[1], weight[2, :32] = 0.0, 0.0
    weight[3] *= 2.0**-130
    weight[4] *= 2.0**100
    weight[5, ::3] = -0.0
    weight[6] = 2.0**127  # four times which is Inf, as is its rounding to 6 times the next scale
    moment = 2.0 * torch.eye(64, dtype=torch.float64)
    rounding = GPTQ(order=order, **OUTPUTS)
    found = rounding.round(weight, lambda: moment, rule)
    expected = RTN(exponents=3).round(weight, lambda: moment, rule)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    _, scales = rounding.compensated(weight, moment, rule)
    assert torch.equal(scales, e8m0.decode(expected[1]))


def test_candidates_stay_in_the_format() -> None:
    blocks = torch.zeros(4, 32)
    blocks[1, 3], blocks[2, 4], blocks[3, 5] = 1.0, 3e38, torch.nan
    own, half, double = candidates(blocks, ScaleRule.FLOOR)
    assert torch.equal(own[:3], torch.tensor([2.0**-127, 0.25, 2.0**125]))
    assert torch.equal(half[:3], torch.tensor([2.0**-127, 0.125, 2.0**124]))
    assert torch.equal(double[:3], torch.tensor([2.0**-126, 0.5, 2.0**126]))
    assert bool(own[3].isnan())


def test_rows_that_are_rounded_together_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = rounding_problem(150, 96)
    rounding = GPTQ(sweeps=2, **OUTPUTS)
    expected = rounding.round(weight, lambda: moment, ScaleRule.FLOOR)
    assert isinstance(expected, MXFP4)
    monkeypatch.setattr(module, "_NUMBERS", 96 * 64)
    found = rounding.round(weight, lambda: moment, ScaleRule.FLOOR)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_channel_that_was_never_seen_counts_for_its_group_alone() -> None:
    """Its weights are rounded plainly under the scale that its group has."""
    weight, moment = rounding_problem(6, 64)
    moment[[3, 40]] = 0.0
    moment[:, [3, 40]] = 0.0
    codes, scales = GPTQ(**OUTPUTS).compensated(weight, moment, ScaleRule.FLOOR)
    for column in (3, 40):
        plain = e2m1.encode(weight[:, column] / scales[:, column // 32])
        assert torch.equal(codes[:, column], plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": Search.OUTPUTS}, "pass exponents=3"),
        ({**OUTPUTS, "scales": GroupScales.STATIC}, "pass scales=dynamic"),
        (
            {**OUTPUTS, "scales": GroupScales.STATIC, "order": Order.DESCENDING},
            "pass scales=dynamic",
        ),
        ({"sweeps": -1}, "pass sweeps=0"),
    ],
)
def test_options_that_contradict_are_refused_at_birth(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        GPTQ(**options)


def test_both_options_have_a_spelling() -> None:
    spec = "gptq:exponents=3:search=outputs:sweeps=2"
    rounding = parse_rounding(spec)
    assert rounding == GPTQ(sweeps=2, **OUTPUTS)
    assert spell(rounding, ROUNDINGS) == spec
    options = options_of(rounding)
    assert (options["search"], options["sweeps"]) == ("outputs", 2)
    with pytest.raises(UsageError, match="values"):
        parse_rounding("gptq:exponents=3:search=output")
