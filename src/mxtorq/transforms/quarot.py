"""QuaRot: one random Hadamard rotation of the residual stream, merged into the weights.

QuaRot (arXiv 2404.00456) rotates every hidden state by R1 = D H, signs D and a Hadamard matrix H,
so that outlier channels disappear everywhere at once; RMSNorm commutes with a rotation once its
gain is folded into the linears that read it. Values are rotated head by head (R2, merged into
v_proj and o_proj), and a Hadamard before down_proj runs online. Nothing is fitted.

Faithful: the three places, one R1 for the whole model, random signs from the seed in R1 only.

Left out: the Hadamards on queries and keys and their online partner across heads before o_proj.
Those on queries and keys serve a quantized KV cache, and attention is not quantized here. The one
across heads is part of the paper's input of o_proj; without it o_proj's input is rotated within
each head only, as SpinQuant does. Embeddings are not centred (see `surgery.offline`).

Decided here: sizes that are no power of two use Paley's matrices (`hadamard.factors`); the paper
names tables of Hadamard matrices.

Not to be expected: a gain under MXFP4. Mixing all channels lifts the scale of every quiet block to
that of the loud ones; its published perplexities in this format are worse than direct rounding's
(LLaMA-3-8B: 9.56 against 8.23, quoted from BRQ, arXiv 2511.04214).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mxtorq.models.family import SiteName
from mxtorq.transforms import hadamard
from mxtorq.transforms.base import (
    Network,
    NetworkShape,
    OfflineRotations,
    SiteStatistics,
    TransformMethod,
)
from mxtorq.transforms.kronecker import KroneckerRotation
from mxtorq.transforms.rotation import Identity


@dataclass(frozen=True, kw_only=True)
class QuaRot(TransformMethod):
    """Random Hadamard on the residual stream, Hadamard per head and before down_proj."""

    needs_hessian: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False

    def check(self, shape: NetworkShape) -> None:
        require_hadamards(shape)

    def rotations(self, network: Network, seed: int) -> OfflineRotations:
        shape = network.shape
        draw = torch.Generator().manual_seed(seed)
        head = full_hadamard(shape.head_dim)
        return OfflineRotations(
            residual=full_hadamard(shape.hidden, draw), heads=(head,) * shape.layers
        )

    def fit(self, statistics: SiteStatistics, seed: int) -> KroneckerRotation | Identity:
        if statistics.name is SiteName.DOWN_IN:
            return full_hadamard(statistics.width)
        return Identity(statistics.width)


def full_hadamard(width: int, draw: torch.Generator | None = None) -> KroneckerRotation:
    """D H of a whole width: random signs D where a generator is given, else D = I.

    Raises:
        UsageError: the width has no Hadamard matrix that can be built.
    """
    return KroneckerRotation(random_signs(width, draw), hadamard.factors(width))


def random_signs(width: int, draw: torch.Generator | None) -> torch.Tensor:
    """1 and -1 with equal probability, float64; all 1 without a generator."""
    if draw is None:
        return torch.ones(width, dtype=torch.float64)
    return torch.randint(0, 2, (width,), generator=draw).double() * 2 - 1


def require_hadamards(shape: NetworkShape) -> None:
    """Refuse a network whose stream, heads or down_proj input have no Hadamard matrix.

    Raises:
        UsageError: with the width and what works there.
    """
    widths = [shape.hidden, shape.head_dim]
    if SiteName.DOWN_IN in shape.sites:
        widths.append(shape.sites[SiteName.DOWN_IN])
    for width in widths:
        hadamard.sizes(width)
