"""What the method compares at a site: every idea under this roof that a site can have by itself.

A candidate is a name and what makes its transform. Those of the papers are the papers' methods with
their own options. Beside them stand the layer-aware transform in four block sizes, and behind two
steps that mix or move whole blocks first: TORQ's R_inter and PeRQ's permutation. A candidate whose
blocks do not fill a width is not one there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

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
from mxtorq.transforms.mxtorq.layer_aware import at_best_scale, layer_aware, layer_smooth
from mxtorq.transforms.perq import PeRQ
from mxtorq.transforms.rotation import BlockRotation, IdentityMethod
from mxtorq.transforms.smoothquant import Sites, SmoothQuant
from mxtorq.transforms.torq.method import TORQ, Levels
from mxtorq.transforms.wush import WUSH

PAPERS: dict[str, TransformMethod] = {
    "identity": IdentityMethod(),
    "smoothquant": SmoothQuant(sites=Sites.ALL),
    "hadamard": Hadamard(),
    "torq": TORQ(blocks=2048),
    "duquant++": DuQuantPlusPlus(),
    "perq": PeRQ(),
    "wush": WUSH(),
}
"""Methods by name, simpler ones first."""


SIZES = (32, 64, 128, 256)
"""Blocks of the layer-aware transform."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A site as candidates see it, or what a transform makes of it."""

    statistics: SiteStatistics
    metric: Float[Tensor, "rows d"]
    """Rows g: an error e of an input costs the mean of (e g^T)^2."""
    activations: Scale
    """By which inputs will be rounded."""
    seed: int
    damping: float
    phases: bool

    @property
    def device(self) -> torch.device:
        """Where the statistics are; methods may fit elsewhere."""
        return self.statistics.amax.device

    def after(self, transform: Transform) -> "Place":
        """The same site for whoever comes after a transform; weights are left as they are."""
        seen = replace(
            self.statistics,
            second_moment=self.statistics.transformed_hessian(transform),
            sample=transform.apply(self.statistics.sample),
        )
        metric = transform.fuse(self.metric.double()).float()
        return replace(self, statistics=seen, metric=metric)


def by_method(method: TransformMethod, place: Place) -> Transform | None:
    """What a method fits by itself."""
    return method.fit(place.statistics, place.seed)


def aware(place: Place, size: int) -> Transform | None:
    """The layer-aware transform, at its best scale; None where blocks do not fill the width."""
    if place.statistics.width % size:
        return None
    found = layer_aware(place.statistics, place.metric, size, place.damping)
    if not place.phases:
        return found
    return at_best_scale(found, place.statistics, place.metric, place.activations)


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


def in_turn(first: Callable[[Place], Transform], size: int, place: Place) -> Transform | None:
    """The layer-aware transform of what another makes of the inputs."""
    if place.statistics.width % size:
        return None
    rest = first(place).to(place.device)
    last = aware(place.after(rest), size)
    return last if last is None else chain(rest, last)


CANDIDATES: dict[str, Callable[[Place], Transform | None]] = {
    **{name: partial(by_method, method) for name, method in PAPERS.items()},
    "hires": hires,
    "layer-smooth/hadamard": smoothed,
    **{f"layer-{size}": partial(aware, size=size) for size in SIZES},
    "torq-inter/layer-32": partial(in_turn, torq_inter, 32),
    "perq-order/layer-32": partial(in_turn, perq_order, 32),
    "perq-order/layer-128": partial(in_turn, perq_order, 128),
}
"""All of them; a tie goes to the earlier, the simpler one."""


def least_cost(name: str) -> int:
    """What a candidate costs at least, in multiply-adds a token and channel."""
    return max((size for size in SIZES if f"layer-{size}" in name), default=0)
