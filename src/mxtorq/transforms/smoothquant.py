"""SmoothQuant: channel factors and nothing else (arXiv 2211.10438).

The oldest answer to outlier channels, and the first step of DuQuant and DuQuant++: as a method of
its own it shows what their rotation adds. See `smoothing` for the formula and its floors.

Faithful: alpha = 0.5 and only inputs that follow a norm (``norms``), w from all linears that share
the input. Decided here: ``all`` also smooths o_proj's and down_proj's inputs, as DuQuant does; s is
floored at 1e-2 as in DuQuant's code, where SmoothQuant's has 1e-5.

It was made for INT8, with one scale a tensor or token. An MX block has a scale of its own, and that
an outlier channel is large no longer hurts channels outside of its block.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from mxtorq.models.family import GATED_DECODER_SITES
from mxtorq.transforms.base import SiteStatistics, Transform, TransformMethod
from mxtorq.transforms.rotation import Identity
from mxtorq.transforms.smoothing import Reader, require_strength, smoothing

AFTER_NORMS = frozenset(site.name for site in GATED_DECODER_SITES if site.reads_residual)


class Sites(StrEnum):
    """Which of a layer's inputs are smoothed."""

    NORMS = "norms"
    """Those of q, k, v and of gate, up: RMSNorm absorbs the factors."""
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(TransformMethod):
    """Channel smoothing without a rotation; the defaults are the paper's."""

    needs_hessian: ClassVar[bool] = False

    alpha: float = 0.5
    sites: Sites = Sites.NORMS
    reader: Reader = Reader.ALL

    def __post_init__(self) -> None:
        require_strength(self.alpha)

    def fit(self, statistics: SiteStatistics, seed: int) -> Transform:
        if self.sites is Sites.NORMS and statistics.name not in AFTER_NORMS:
            return Identity(statistics.width)
        return smoothing(statistics, self.alpha, self.reader)
