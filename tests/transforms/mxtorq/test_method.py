"""The choice is the least loss of all candidates, within what it may cost and who runs it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import oracles
from mxtorq.config import parse_method
from mxtorq.errors import UsageError
from mxtorq.specs import options_of
from mxtorq.transforms.base import Choice, SiteStatistics, Transform
from mxtorq.transforms.mxtorq.candidates import (
    CANDIDATES,
    Place,
    aware,
    least_cost,
    perq_order,
    torq_inter,
)
from mxtorq.transforms.mxtorq.loss import Losses
from mxtorq.transforms.mxtorq.method import MXTORQ, Metric

FEW = "identity+smoothquant+hadamard+duquant+++perq+wush+layer-32+layer-64+layer-smooth/hadamard"


@pytest.fixture(scope="module")
def site() -> SiteStatistics:
    return oracles.statistics(256)


def place(
    seen: SiteStatistics,
    rows: torch.Tensor,
    *,
    seed: int = 0,
    damping: float = 0.01,
    phases: bool = True,
    budget: int = 256,
) -> Place:
    assert seen.judgement is not None
    return Place(
        statistics=seen,
        metric=rows,
        activations=seen.judgement.activations,
        seed=seed,
        damping=damping,
        phases=phases,
        budget=budget,
    )


def brute(method: MXTORQ, seen: SiteStatistics) -> dict[str, tuple[Transform, float, float]]:
    """Each candidate that fits the width: its transform, the loss of inputs, and of weights."""
    judgement = seen.judgement
    assert judgement is not None
    rows = judgement.gradients
    found = {}
    for name in method.names:
        here = place(seen, rows, seed=3, damping=method.damping, phases=method.phases)
        fit = CANDIDATES[name](here)
        if fit is not None:
            losses = Losses(seen, judgement, judgement.held_out_gradients)
            found[name] = fit, losses.of_inputs(fit), losses.of_weights(fit)
    return found


def same(one: Transform, two: Transform) -> bool:
    mine, theirs = one.tensors(), two.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize(
    ("spec", "width", "changes"),
    [
        ("all", 256, {}),
        (FEW, 160, {}),  # no blocks of 64, 128 or 256
        (FEW, 256, {"corrected": True}),
        ("identity+hadamard+perq-order/layer-32+torq-inter/layer-32", 96, {}),
    ],
)
def test_the_choice_is_the_least_of_all(spec: str, width: int, changes: dict[str, Any]) -> None:
    """By equality with every loss computed to the end. What is ruled out is above the least by
    the inputs alone."""
    method = MXTORQ(candidates=spec, budget=256)
    seen = oracles.judged(oracles.statistics(width), **changes)
    choice = method.choose(seen, 3)
    every = brute(method, seen)
    losses = {name: of_x + of_w for name, (_, of_x, of_w) in every.items()}
    least = min(losses.values())
    assert choice.name == next(name for name in losses if losses[name] == least)
    assert choice.losses[choice.name] == least
    assert all(losses[name] == found for name, found in choice.losses.items())
    assert {*choice.losses, *choice.at_least} == set(losses)
    assert not set(choice.losses) & set(choice.at_least)
    assert same(choice.transform, every[choice.name][0])


def test_what_is_ruled_out_could_not_win(site: SiteStatistics) -> None:
    """With weights that lose nothing the second best is out, with what its inputs lose."""
    seen = oracles.judged(site, rounded=lambda weight, moment: weight)
    method = MXTORQ(candidates=FEW)
    choice = method.choose(seen, 3)
    every = brute(method, seen)
    assert list(choice.losses) == [choice.name]
    assert same(method.fit(seen, 3), choice.transform)
    assert set(choice.at_least) == set(every) - {choice.name}
    for name, bound in choice.at_least.items():
        assert bound == every[name][1] > choice.losses[choice.name]


@pytest.mark.parametrize("quiet", ["inputs", "gradients"])
def test_a_tie_goes_to_the_simplest(quiet: str) -> None:
    """Where nothing is lost whatever is done, nothing is done."""
    rows = torch.zeros(50, 128) if quiet == "inputs" else oracles.activations(50, 128, 3, seed=0)
    seen = oracles.judged(
        oracles.site(rows, torch.randn(32, 128)),
        **(
            {name: torch.zeros(20, 128) for name in ("gradients", "held_out_gradients")}
            if quiet == "gradients"
            else {}
        ),
    )
    choice = MXTORQ().choose(seen, 0)
    assert choice.name == "identity"
    assert set(choice.losses.values()) == {0.0}
    assert set(choice.losses) == set(CANDIDATES) - {"layer-256"}
    # By the order of the table, however they were named.
    assert MXTORQ(candidates="wush+hadamard").choose(seen, 0).name == "hadamard"
    # Without a margin also where engines run the later one alone.
    assert seen.judgement is not None
    judgement = replace(seen.judgement, stock=lambda transform: transform.kind != "diagonal")
    both = MXTORQ(candidates="smoothquant+hadamard")
    assert both.choose(replace(seen, judgement=judgement), 0).name == "smoothquant"


@pytest.mark.parametrize("budget", [0, 32, 64, 128, 256])
def test_no_choice_is_above_the_budget(site: SiteStatistics, budget: int) -> None:
    choice = MXTORQ(candidates=FEW, budget=budget).choose(oracles.judged(site), 3)
    found = brute(MXTORQ(candidates=FEW), oracles.judged(site))
    allowed = {name for name, (fit, *_) in found.items() if fit.multiply_adds <= budget * 256}
    assert {*choice.losses, *choice.at_least} == allowed
    assert choice.transform.multiply_adds <= budget * 256
    assert (choice.name == "identity") == (budget == 0)
    large = {name for name in allowed if least_cost(name) > 32}
    assert bool(large) == (budget > 32)


def test_a_diagonal_that_will_be_merged_costs_nothing(site: SiteStatistics) -> None:
    def merged(transform: Transform) -> int:
        return transform.multiply_adds - (256 if transform.kind in ("diagonal", "chain") else 0)

    seen = oracles.judged(site, multiply_adds=merged)
    free = MXTORQ(candidates=FEW, budget=0).choose(seen, 3)
    assert {*free.losses, *free.at_least} == {"identity", "smoothquant"}
    one = MXTORQ(candidates=FEW, budget=32).choose(seen, 3)
    assert {"duquant++", "layer-smooth/hadamard"} <= {*one.losses, *one.at_least}


def test_a_margin_is_what_a_stock_engine_may_lose(site: SiteStatistics) -> None:
    """The best of those that engines run, where it is within the margin; else the best of all."""
    seen = oracles.judged(site)
    every = {name: x + w for name, (_, x, w) in brute(MXTORQ(candidates=FEW), seen).items()}
    best = min(every, key=lambda name: every[name])
    stock = min("identity", "hadamard", key=lambda name: every[name])
    needed = every[stock] / every[best] - 1
    assert needed > 0.01

    def chosen(margin: float) -> Choice:
        return MXTORQ(candidates=FEW, margin=margin).choose(seen, 3)

    assert chosen(0.0).name == chosen(0.99 * needed).name == best
    assert chosen(1.01 * needed).name == chosen(100.0).name == stock
    assert chosen(1.01 * needed).losses[stock] == every[stock]
    none = oracles.judged(site, stock=lambda transform: False)
    assert MXTORQ(candidates=FEW, margin=9.0).choose(none, 3).name == best


def test_nothing_is_chosen_that_the_target_does_not_run(site: SiteStatistics) -> None:
    seen = oracles.judged(site, runs=lambda transform: transform.kind == "block-rotation")
    choice = MXTORQ(candidates=FEW).choose(seen, 3)
    assert (choice.name, choice.transform.kind) == ("hadamard", "block-rotation")
    assert list(choice.losses) == ["hadamard"]
    assert not choice.at_least
    refused = oracles.judged(site, runs=lambda transform: False)
    with pytest.raises(UsageError, match=r"add identity[^$]*raise the budget"):
        MXTORQ(candidates=FEW).choose(refused, 3)


def test_where_no_candidate_fits_the_width() -> None:
    seen = oracles.judged(oracles.statistics(96))
    with pytest.raises(UsageError, match="a width of 96") as caught:
        MXTORQ(candidates="layer-64+layer-128").choose(seen, 0)
    assert all(vars(caught.value).get(part) for part in ("asked", "found", "why", "todo"))


def test_outputs_alike_is_wush_own_measure(site: SiteStatistics) -> None:
    """The rows of the weights are the metric, and every output is worth the same."""
    seen = oracles.judged(site)
    rows = sum(map(len, site.weights))
    alike = oracles.judged(
        site,
        gradients=torch.cat(site.weights),
        held_out_gradients=torch.cat(site.weights),
        output_weights=torch.full((rows,), 1 / rows, dtype=torch.float64),
    )
    by_layer = MXTORQ(candidates=FEW).choose(alike, 3)
    found = MXTORQ(candidates=FEW, metric=Metric.OUTPUTS).choose(seen, 3)
    assert found.losses == by_layer.losses
    assert same(found.transform, by_layer.transform)
    assert found.losses != MXTORQ(candidates=FEW).choose(seen, 3).losses


def test_statistics_without_a_judgement_are_refused(site: SiteStatistics) -> None:
    with pytest.raises(UsageError, match="held-out inputs and gradients"):
        MXTORQ().fit(site, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mxtorq:candidates=wusch", "did you mean 'wush'"),
        ("mxtorq:candidates=identity+", "did you mean 'identity'"),
        ("mxtorq:candidates=hadamard+layer-48", "layer-48[^$]*did you mean 'layer-"),
        ("mxtorq:candidates=", "the candidate ''"),
        ("mxtorq:budget=-1", "budget=-1"),
        ("mxtorq:margin=-0.1", "margin=-0.1"),
        ("mxtorq:margin=inf", "margin=inf"),
        ("mxtorq:margin=nan", "margin=nan"),
        ("mxtorq:damping=0", "damping=0"),
        ("mxtorq:damping=2", "damping=2"),
        ("mxtorq:damping=nan", "damping=nan"),
        ("mxtorq:metric=outptus", "outputs"),
        ("mxtorq:candidate=wush", "candidates"),
    ],
)
def test_options_are_checked_at_birth(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_method(spec)
    assert all(vars(caught.value).get(part) for part in ("asked", "found", "why", "todo"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("all", tuple(CANDIDATES)),
        ("wush", ("wush",)),
        ("wush+identity", ("identity", "wush")),
        ("duquant++", ("duquant++",)),
        ("wush+duquant++", ("duquant++", "wush")),
        ("duquant+++wush+wush", ("duquant++", "wush")),
        ("layer-smooth/hadamard+torq", ("torq", "layer-smooth/hadamard")),
    ],
)
def test_candidates_by_name(text: str, names: tuple[str, ...]) -> None:
    method = MXTORQ(candidates=text)
    assert method.names == names
    assert parse_method(f"mxtorq:candidates={text}") == method
    assert options_of(method)["candidates"] == text


def test_every_name_can_be_named_by_itself(site: SiteStatistics) -> None:
    for name in CANDIDATES:
        assert MXTORQ(candidates=name).names == (name,)
        assert least_cost(name) in (0, 32, 64, 128, 256)
    assert next(iter(CANDIDATES)) == "identity"


def test_least_costs_are_not_above_what_candidates_cost(site: SiteStatistics) -> None:
    seen = oracles.judged(site)
    assert seen.judgement is not None
    for name in CANDIDATES:
        fit = CANDIDATES[name](place(seen, seen.judgement.gradients, phases=False))
        assert fit is not None
        assert least_cost(name) * 256 <= fit.multiply_adds


@pytest.mark.parametrize(
    ("name", "first", "size"),
    [
        ("torq-inter/layer-32", torq_inter, 32),
        ("perq-order/layer-32", perq_order, 32),
        ("perq-order/layer-128", perq_order, 128),
    ],
)
def test_pairs_fit_the_second_to_what_the_first_leaves(
    name: str, first: Callable[[Place], Transform], size: int, site: SiteStatistics
) -> None:
    """As if the statistics were those of the transformed inputs, and gradients those there."""
    seen = oracles.judged(site)
    assert seen.judgement is not None
    rows = seen.judgement.gradients
    before = first(place(seen, rows))
    both = CANDIDATES[name](place(seen, rows, budget=size))
    there = before.fuse(rows.double()).float()
    alone = aware(place(seen.transformed(before), there, budget=size), size)
    assert both is not None
    assert alone is not None
    x = torch.randn(7, 256, dtype=torch.float64)
    assert torch.equal(both.apply(x), alone.apply(before.apply(x)))
