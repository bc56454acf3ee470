"""DuQuant++ (arXiv 2604.17789) and DuQuant (arXiv 2406.01721): options and fits.

DuQuant++ observes that with an MX scale a block of 32, blocks need not be alike, and so keeps one
of DuQuant's rotations, of size 32: smoothing, then R. DuQuant itself, made for INT4, is smoothing,
R1, zigzag permutation, R2, with blocks of 128.

Faithful to the released code: alpha = 0.6 and whose weights count, smoothing before rotation, one
R for all blocks of an input, found on all blocks of all tokens pooled, inputs of q, k, v and of
gate, up shared, online rotations, 256 steps for DuQuant and 128 for DuQuant++ (its run script; its
readme says 256).

Left open or changed here: the released code searches on the mean of the embeddings of its
calibration texts, one pseudo-text sent through quantized layers; here it is the site's sample of
real tokens. Q' is drawn for each search from the seed and the input's name. DuQuant's clipping of
activations and weights (its lac and swc, for INT4) is left out: an MX scale clips by its rule.
DuQuant++'s block scales from a 256-level grid are no OCP scales and no part of a transform; its
published numbers contain them, so the ones here are not comparable.
"""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.base import NetworkShape, SiteStatistics, Transform, TransformMethod
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.blocks import require_nesting, require_whole_blocks
from mxtorq.transforms.chain import chain
from mxtorq.transforms.duquant.greedy import GreedyFit, Index, greedy_rotation, random_base
from mxtorq.transforms.duquant.zigzag import zigzag_order
from mxtorq.transforms.permutation import Permutation
from mxtorq.transforms.rotation import BlockRotation, Identity
from mxtorq.transforms.smoothing import Reader, require_strength, smoothing


@dataclass(frozen=True, kw_only=True)
class DuQuantPlusPlus(TransformMethod):
    """Smoothing, then one outlier-aware rotation an input."""

    needs_hessian: ClassVar[bool] = False

    smooth: bool = True
    alpha: float = 0.6
    reader: Reader = Reader.RELEASED
    steps: int = 128
    index: Index = Index.ROW
    shared: bool = True
    """False: a rotation of its own for every block, the ablation."""
    block: int = BLOCK

    def __post_init__(self) -> None:
        _require_options("duquant++", self.alpha, self.steps, self.block)

    def check(self, shape: NetworkShape) -> None:
        require_whole_blocks("duquant++", self.block, shape.sites)

    def fit(self, statistics: SiteStatistics, seed: int) -> Transform:
        require_whole_blocks("duquant++", self.block, {statistics.site: statistics.width})
        draw = site_generator(seed, statistics.site)
        first = _first_link(self, statistics)
        rows = _smoothed(statistics, first).unflatten(-1, (-1, self.block))
        if self.shared:
            fit = _search(rows, draw, self.steps, self.index)
            rotation: Transform = BlockRotation(statistics.width, fit.rotation)
        else:
            fits = [_search(own, draw, self.steps, self.index) for own in rows.unbind(1)]
            rotation = BlockMatrices(torch.stack([fit.rotation for fit in fits]))
        return chain(first, rotation)


@dataclass(frozen=True, kw_only=True)
class DuQuant(TransformMethod):
    """Smoothing, rotation, zigzag permutation, rotation."""

    needs_hessian: ClassVar[bool] = False

    smooth: bool = True
    alpha: float = 0.6
    reader: Reader = Reader.RELEASED
    steps: int = 256
    """Of each of the two searches."""
    index: Index = Index.ROW
    block: int = 128

    def __post_init__(self) -> None:
        _require_options("duquant", self.alpha, self.steps, self.block)

    def check(self, shape: NetworkShape) -> None:
        require_whole_blocks("duquant", self.block, shape.sites)

    def fit(self, statistics: SiteStatistics, seed: int) -> Transform:
        require_whole_blocks("duquant", self.block, {statistics.site: statistics.width})
        draw = site_generator(seed, statistics.site)
        first = _first_link(self, statistics)
        rows = _smoothed(statistics, first)
        r1 = self._rotation(rows, draw)
        rows = r1.to(rows.device).apply(rows)
        order = Permutation(zigzag_order(rows.abs().amax(0), self.block))
        r2 = self._rotation(order.to(rows.device).apply(rows), draw)
        return chain(first, r1, order, r2)

    def _rotation(self, rows: Float64[Tensor, "sampled d"], draw: torch.Generator) -> BlockRotation:
        fit = _search(rows.unflatten(-1, (-1, self.block)), draw, self.steps, self.index)
        return BlockRotation(rows.shape[1], fit.rotation)


def site_generator(seed: int, site: str) -> torch.Generator:
    """Random numbers of one input: other inputs draw others, whichever is fitted first."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {site}".encode()))


def _first_link(method: DuQuant | DuQuantPlusPlus, statistics: SiteStatistics) -> Transform:
    if method.smooth:
        return smoothing(statistics, method.alpha, method.reader)
    return Identity(statistics.width)


def _smoothed(statistics: SiteStatistics, first: Transform) -> Float64[Tensor, "sampled d"]:
    rows = statistics.sample.double()
    return first.to(rows.device).apply(rows)


def _search(
    rows: Float64[Tensor, "*rows n"], draw: torch.Generator, steps: int, index: Index
) -> GreedyFit:
    base = random_base(rows.shape[-1], draw)
    return greedy_rotation(rows.reshape(-1, rows.shape[-1]), base, steps=steps, index=index)


def _require_options(method: str, alpha: float, steps: int, block: int) -> None:
    require_strength(alpha)
    require_nesting(method, block)
    if steps < 1:
        raise UsageError(
            asked=f"{method} with steps = {steps}",
            found="a number below 1",
            why="without a step the search has nothing to choose from",
            todo="choose 128 or 256, or the method identity or smoothquant",
        )
