"""The method `mxtorq`: at every site the candidate that loses least on inputs that none has seen.

Every candidate (`candidates`) is fitted to the same statistics, which are summed up once, and then
judged (`loss`) on held-out sequences of the calibration text, their inputs and their gradients,
with both operands rounded by the rules of the run. The least loss is taken: at no site and on no
choice of candidates is the loss there above that of any of them. A tie goes to the candidate that
is earlier in the table, the simpler one.

``budget`` is what a transform may cost at run time. ``margin`` is what may be lost for a transform
that engines run without mxtorq: one matrix of 32 x 32 for all blocks of an input, or nothing.
"""

import math
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from mxtorq import specs
from mxtorq.errors import UsageError
from mxtorq.transforms.base import Choice, Judgement, SiteStatistics, Transform, TransformMethod
from mxtorq.transforms.mxtorq.candidates import CANDIDATES, Place, least_cost
from mxtorq.transforms.mxtorq.loss import Losses
from mxtorq.transforms.wush import SMALLEST_DAMPING

ALL = "all"


class Metric(StrEnum):
    """What an error counts by."""

    LAYER = "layer"
    """What it does to the output of the layer."""
    OUTPUTS = "outputs"
    """What it does to the outputs of the site's own linears, all of them alike."""


@dataclass(frozen=True, kw_only=True)
class MXTORQ(TransformMethod):
    """A choice among all of them, by measurement."""

    chooses: ClassVar[bool] = True
    usual_rounding: ClassVar[str] = "gptq:exponents=3:search=outputs:sweeps=2:inputs=corrected"

    budget: int = 128
    """Multiply-adds that a token may cost, for each channel of an input."""
    margin: float = 0.0
    """What part of the least loss may be lost on top for a transform that stock engines run."""
    candidates: str = ALL
    """Names out of `candidates.CANDIDATES`, joined by ``+``."""
    metric: Metric = Metric.LAYER
    """By what transforms are fitted and judged."""
    phases: bool = True
    """Whether each MX block of a layer-aware transform gets its best factor."""
    damping: float = 0.003
    """Of the layer-aware transforms: part of the mean diagonal that both moments get."""

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in CANDIDATES:
                raise specs.unknown("candidate", name, CANDIDATES)
        if self.budget < 0 or not 0 <= self.margin < float("inf"):
            raise UsageError(
                asked=f"budget={self.budget}, margin={self.margin}",
                found="a negative number, or a margin without end",
                why="both are prices: multiply-adds a token and channel, and a part of the loss",
                todo="pass budget=0 for what is free at run time, 32 for one block matrix, and a "
                "margin such as 0.05, or leave them out",
            )
        if not SMALLEST_DAMPING <= self.damping <= 1:
            raise UsageError(
                asked=f"damping={self.damping}",
                found=f"a number that is not between {SMALLEST_DAMPING} and 1",
                why="second moments of few tokens are singular without some, and a damping above 1 "
                "leaves little of them",
                todo="pass a small number such as 0.003",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates, simpler ones first."""
        if self.candidates == ALL:
            return tuple(CANDIDATES)
        named = re.split(r"\+(?=[^+])", self.candidates)  # a name may end with plus signs
        return tuple(name for name in CANDIDATES if name in named) + tuple(
            name for name in named if name not in CANDIDATES
        )

    def fit(self, statistics: SiteStatistics, seed: int) -> Transform:
        return self.choose(statistics, seed).transform

    def choose(self, statistics: SiteStatistics, seed: int) -> Choice:
        """As `fit`, with the loss of every candidate.

        Raises:
            UsageError: the statistics have nothing to judge by, or no candidate can serve.
        """
        judgement = statistics.judgement
        if judgement is None:
            raise UsageError(
                asked=f"a choice for {statistics.site}",
                found="statistics without held-out inputs and gradients",
                why="candidates are judged by what they lose on inputs that none was fitted to",
                todo="let a run collect them (`chooses` of the method stays True), or fit one of "
                "the candidates by itself, such as wush",
            )
        metric, others, judgement = self._metric(statistics, judgement)
        place = Place(
            statistics=statistics,
            metric=metric,
            activations=judgement.activations,
            seed=seed,
            damping=self.damping,
            phases=self.phases,
            budget=self.budget,
        )
        found = {
            name: fit
            for name in self.names
            if (fit := self._candidate(name, place, judgement)) is not None
        }
        if not found:
            raise UsageError(
                asked=f"one of {', '.join(self.names)} for {statistics.site}",
                found=f"a width of {statistics.width}, a budget of {self.budget} multiply-adds a "
                "token and channel, and a target that runs none of them",
                why="a candidate's blocks have to fill the width, its price to be within the "
                "budget, and the target has to run it",
                todo="add identity, which is always possible, or raise the budget",
            )
        losses = Losses(statistics, judgement, others)
        least = {name: losses.of_inputs(fit) for name, fit in found.items()}
        whole: dict[str, float] = {}
        best = math.inf
        for name in sorted(least, key=lambda name: least[name]):
            if least[name] > (1 + self.margin) * best:
                break  # nor can any later one have the least loss
            whole[name] = least[name] + losses.of_weights(found[name])
            best = min(best, whole[name])
        # In the order of the table, so that the first of equals is the simplest.
        near = [name for name in found if whole.get(name, math.inf) <= (1 + self.margin) * best]
        stock = [name for name in near if self.margin > 0 and judgement.stock(found[name])]
        chosen = min(stock or near, key=lambda name: whole[name])
        return Choice(found[chosen], chosen, whole, {n: least[n] for n in found if n not in whole})

    def _candidate(self, name: str, place: Place, judgement: Judgement) -> Transform | None:
        """A candidate's transform, if there is one that the budget allows and the target runs."""
        if least_cost(name) > self.budget:
            return None
        fit = CANDIDATES[name](place)
        most = self.budget * place.statistics.width
        if fit is None or judgement.multiply_adds(fit) > most or not judgement.runs(fit):
            return None
        return fit.to(place.device)

    def _metric(
        self, statistics: SiteStatistics, judgement: Judgement
    ) -> tuple[Tensor, Tensor, Judgement]:
        """Rows g, by which an error e costs the mean of (e g^T)^2, to fit to and to judge by; and
        what outputs are worth."""
        if self.metric is Metric.LAYER:
            return judgement.gradients, judgement.held_out_gradients, judgement
        rows = torch.cat([weight.float() for weight in statistics.weights])
        alike = torch.full_like(judgement.output_weights, 1 / len(rows))
        return rows, rows, replace(judgement, output_weights=alike)
