"""What the method compares at a site: every idea under this roof that a site can have by itself.

A candidate is a name and what makes its transform. Those of the papers are the papers' methods with
their own options. Beside them stand the layer-aware transform in four block sizes, and behind two
steps that mix or move whole blocks first: TORQ's R_inter and PeRQ's permutation. A candidate whose
blocks do not fill a width is not one there.
"""

from dataclasses import replace

from torch import Tensor

from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.base import Judgement, SiteStatistics, Transform, TransformMethod
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
    "hires": HiRes(),
}
"""Methods by name, simpler ones first."""

SIZES = {"layer-32": 32, "layer-64": 64, "layer-128": 128, "layer-256": 256}
"""Blocks of the layer-aware transform."""

FIRST: dict[str, TransformMethod] = {
    "torq-inter": TORQ(levels=Levels.INTER),
    "perq-order": PeRQ(rotate=False),
}
"""What may go before a layer-aware transform."""

PAIRS = {
    "torq-inter/layer-32": ("torq-inter", "layer-32"),
    "perq-order/layer-32": ("perq-order", "layer-32"),
    "perq-order/layer-128": ("perq-order", "layer-128"),
}

SMOOTHED = "layer-smooth/hadamard"
"""The layer-aware transform whose matrices are diagonal, and Hadamard's after it."""

NAMES = (*PAPERS, SMOOTHED, *SIZES, *PAIRS)
"""All of them; a tie goes to the earlier."""


def least_cost(name: str) -> int:
    """What a candidate costs at least, in multiply-adds a token and channel."""
    return SIZES.get(PAIRS.get(name, ("", name))[1], 0)


def fitted(
    name: str,
    statistics: SiteStatistics,
    judgement: Judgement,
    metric: Tensor,
    seed: int,
    *,
    damping: float,
    phases: bool,
) -> Transform | None:
    """A candidate's transform of a site; None where its blocks do not fill the width."""
    if name in PAPERS:
        return PAPERS[name].fit(statistics, seed)
    if name == SMOOTHED:
        smooth = layer_smooth(statistics, metric, damping)
        return chain(smooth, BlockRotation(statistics.width, sylvester(BLOCK)))
    before, last = PAIRS.get(name, ("", name))
    size = SIZES[last]
    if statistics.width % size:
        return None
    rest, seen, rows = None, statistics, metric
    if before:
        rest = FIRST[before].fit(statistics, seed)
        moment = statistics.transformed_hessian(rest)
        sample = rest.apply(statistics.sample)
        seen = replace(statistics, second_moment=moment, sample=sample)
        rows = rest.fuse(metric.double()).float()
    found = layer_aware(seen, rows, size, damping)
    if phases:
        found = at_best_scale(found, seen, rows, judgement.activations)
    return found if rest is None else chain(rest, found)
