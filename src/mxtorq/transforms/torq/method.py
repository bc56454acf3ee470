"""TORQ's options and its fit for one input site.

Faithful: both levels, their order (R_intra is fitted on what R_inter leaves), one pair an input
site, the S-step's scale, K_top = 16, ten rounds, online activations and fused weights.

Left open by the paper, decided here: the angle (`inter_block`), one shared R_inter rather than one
a position (only that fuses, Algorithm 3), Sigma over all calibration tokens with none left out,
lambda = 1 and 8 pairs (those of a third-party port), the solver's details (`intra_block`), and the
weight quantizer, which is the recipe's ``rounding``. The full text could not be had: what we know
is the abstract, reading notes and a port that cites sections; see docs/methods/torq.md.

Not to be expected: that equal block variance alone lowers the error. An outlier channel is spread
over the same position of many blocks, and each of those blocks then needs a larger scale; the
second level has to undo that. Under strict OCP scales block-Hadamard-32 is often as good or better.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.base import SiteStatistics, TransformMethod
from mxtorq.transforms.torq.inter_block import (
    EMPTY_CHAIN,
    GivensChain,
    equalize,
    exact_target,
    pair_mean,
)
from mxtorq.transforms.torq.intra_block import maximize_entropy
from mxtorq.transforms.torq.rotation import TwoLevelRotation


class Levels(StrEnum):
    """Which of the two rotations are fitted: the paper's ablation."""

    BOTH = "both"
    INTER = "inter"
    INTRA = "intra"


class InterAngle(StrEnum):
    """How Algorithm 1 chooses its angle."""

    EXACT = "exact"
    MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class TORQ(TransformMethod):
    """Two-level orthogonal rotation; the defaults are the paper's where it states them."""

    needs_weights: ClassVar[bool] = False

    levels: Levels = Levels.BOTH
    angle: InterAngle = InterAngle.EXACT
    s_step: ScaleRule = ScaleRule.FLOOR6
    """Eq. 6. ``floor`` uses the deployed OCP scale instead; the search then tends to stall."""
    rounds: int = 10
    top: int = 16
    pairs: int = 8
    complementarity: float = 1.0
    tolerance: float = 1e-5
    """Smallest change of L that starts another round."""
    blocks: int = 8192
    """Pooled blocks that R_intra is fitted on."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.pairs, self.blocks) < 1 or not 2 <= self.top <= BLOCK:
            raise UsageError(
                asked=f"{self}",
                found=f"rounds={self.rounds}, pairs={self.pairs}, blocks={self.blocks}, "
                f"top={self.top}",
                why=f"the search needs at least one of each, and 2 to {BLOCK} candidate columns",
                todo="raise the one that is too small",
            )

    def fit(self, statistics: SiteStatistics, seed: int) -> TwoLevelRotation:
        inter = EMPTY_CHAIN if self.levels is Levels.INTRA else self._fit_inter(statistics)
        if self.levels is Levels.INTER:
            return TwoLevelRotation(statistics.width, inter, None)
        rows = inter.apply(statistics.sample.unflatten(-1, (-1, BLOCK)).double()).flatten(0, 1)
        draw = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(rows), generator=draw)[: self.blocks]
        intra = maximize_entropy(
            rows[chosen.sort().values.to(rows.device)],
            s_step=self.s_step,
            rounds=self.rounds,
            top=self.top,
            pairs=self.pairs,
            complementarity=self.complementarity,
            tolerance=self.tolerance,
        )
        return TwoLevelRotation(statistics.width, inter, intra.rotation)

    def _fit_inter(self, statistics: SiteStatistics) -> GivensChain:
        sigma = statistics.block_second_moment()
        if self.angle is InterAngle.EXACT:
            return equalize(sigma, angle=exact_target)
        return equalize(sigma, angle=pair_mean, tolerance=1e-6, max_rotations=20 * len(sigma))
