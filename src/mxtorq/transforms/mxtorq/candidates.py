"""What the method compares at a site: every idea under this roof that a site can have by itself.

A candidate is a name and what makes its transform. Those of the papers are the papers' methods with
their own options. Beside them stand the layer-aware transform in four block sizes, and behind two
steps that mix or move whole blocks first: TORQ's R_inter and PeRQ's permutation. A candidate whose
blocks do not fill a width is not one there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import Scale
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.base import SiteStatistics, Transform, TransformMethod
from mxtorq.transforms.chain import chain
from mxtorq.transforms.duquant.method import DuQuantPlusPlus
from mxtorq.transforms.hadamard import Hadamard, sylvester
from mxtorq.transforms.hires.method import HiRes
from mxtorq.transforms.mxtorq.layer_aware import (
    BlockMoments,
    at_best_scale,
    layer_aware,
    layer_smooth,
    moments_of,
)
from mxtorq.transforms.perq import PeRQ
from mxtorq.transforms.rotation import BlockRotation, IdentityMethod
from mxtorq.transforms.smoothquant import Sites, SmoothQuant
from mxtorq.transforms.torq.method import TORQ, Levels
from mxtorq.transforms.wush import WUSH

PAPERS: dict[str, TransformMethod] = {
    "identity": IdentityMethod(),
    "smoothquant": SmoothQuant(sites=Sites.ALL),
    "hadamard": Hadamard(),
    "torq": TORQ(blocks=1024),
    "duquant++": DuQuantPlusPlus(),
    "perq": PeRQ(),
    "wush": WUSH(),
}
"""Methods by name, simpler ones first."""


SIZES = (32, 64, 128, 256)
"""Blocks of the layer-aware transform."""

_ROWS = 512  # of the metric that go through a step at once


class Seen(NamedTuple):
    """What layer-aware transforms are fitted to."""

    moments: BlockMoments
    """In the largest blocks that any of them has there."""
    sample: Float[Tensor, "sampled d"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A site as candidates see it. What several of them work with is made once, when the first
    asks, and ends with the site."""

    statistics: SiteStatistics
    metric: Float[Tensor, "rows d"]
    """Rows g: an error e of an input costs the mean of (e g^T)^2."""
    activations: Scale
    """By which inputs will be rounded."""
    seed: int
    damping: float
    phases: bool
    budget: int
    """Multiply-adds that a token may cost, for each channel."""
    _behind: dict[str, tuple[Transform, Seen]] = field(default_factory=dict, init=False)

    @property
    def device(self) -> torch.device:
        """Where the statistics are; methods may fit elsewhere."""
        return self.statistics.amax.device

    @cached_property
    def plain(self) -> Seen:
        """The inputs as they are."""
        return self._seen(self.statistics, self.metric, SIZES)

    def behind(self, step: str) -> tuple[Transform, Seen]:
        """A step, and what is seen behind it; weights are left as they are."""
        if step not in self._behind:
            fit, sizes = STEPS[step]
            first = fit(self).to(self.device)
            statistics = replace(
                self.statistics,
                second_moment=self.statistics.transformed_hessian(first),
                sample=first.apply(self.statistics.sample),
            )
            # Some rows at a time: all of them in float64 are 0.9 GB at a width of 14336.
            parts = [first.fuse(rows.double()).float() for rows in self.metric.split(_ROWS)]
            metric = torch.cat(parts)
            self._behind[step] = first, self._seen(statistics, metric, sizes)
        return self._behind[step]

    def _seen(self, statistics: SiteStatistics, metric: Tensor, sizes: tuple[int, ...]) -> Seen:
        width = statistics.width
        fitting = [size for size in sizes if size <= self.budget and width % size == 0]
        return Seen(moments_of(statistics, metric, max(fitting, default=BLOCK)), statistics.sample)


def by_method(method: TransformMethod, place: Place) -> Transform | None:
    """What a method fits by itself."""
    return method.fit(place.statistics, place.seed)


def aware(place: Place, size: int) -> Transform | None:
    """The layer-aware transform, at its best scale; None where blocks do not fill the width."""
    return None if place.statistics.width % size else _aware(place, place.plain, size)


def in_turn(step: str, size: int, place: Place) -> Transform | None:
    """The layer-aware transform of what a step makes of the inputs."""
    if place.statistics.width % size:
        return None
    first, seen = place.behind(step)
    return chain(first, _aware(place, seen, size))


def _aware(place: Place, seen: Seen, size: int) -> Transform:
    moments = seen.moments.within(size)
    found = layer_aware(moments, place.damping)
    if not place.phases:
        return found
    return at_best_scale(found, moments, seen.sample, place.activations)


def hires(place: Place) -> Transform:
    """HiRes' geometry under the rule of the inputs; under ``floor`` where that is not OCP's."""
    rule = place.activations
    scale = rule if isinstance(rule, ScaleRule) else ScaleRule.FLOOR
    return HiRes(scale=scale).fit(place.statistics, place.seed)


def smoothed(place: Place) -> Transform:
    """The layer-aware transform whose matrices are diagonal, and Hadamard's after it."""
    smooth = layer_smooth(place.statistics, place.metric, place.damping)
    return chain(smooth, BlockRotation(place.statistics.width, sylvester(BLOCK)))


def torq_inter(place: Place) -> Transform:
    """TORQ's R_inter alone."""
    return TORQ(levels=Levels.INTER).fit(place.statistics, place.seed)


def perq_order(place: Place) -> Transform:
    """PeRQ's permutation alone."""
    return PeRQ(rotate=False).fit(place.statistics, place.seed)


STEPS: dict[str, tuple[Callable[[Place], Transform], tuple[int, ...]]] = {
    "torq-inter": (torq_inter, (32,)),
    "perq-order": (perq_order, (32, 128)),
}
"""What mixes or moves whole blocks first, and the blocks of the layer-aware transforms behind."""


CANDIDATES: dict[str, Callable[[Place], Transform | None]] = {
    **{name: partial(by_method, method) for name, method in PAPERS.items()},
    "hires": hires,
    "layer-smooth/hadamard": smoothed,
    **{f"layer-{size}": partial(aware, size=size) for size in SIZES},
    **{
        f"{step}/layer-{size}": partial(in_turn, step, size)
        for step, (_, sizes) in STEPS.items()
        for size in sizes
    },
}
"""All of them; a tie goes to the earlier, the simpler one."""


def least_cost(name: str) -> int:
    """What a candidate costs at least, in multiply-adds a token and channel."""
    return max((size for size in SIZES if f"layer-{size}" in name), default=0)
