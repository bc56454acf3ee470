"""Sums over calibration tokens for one input site, filled batch by batch.

One Hessian serves every method and every rounding: TORQ's Sigma is its partial trace, GPTQ's
matrix is its rotation. A uniform sample of tokens is kept beside it for what moments cannot tell
(codeword histograms, output errors); its positions are drawn beforehand, so that it does not depend
on the batch size.

The Hessian is half of the work of a calibration. At most `TOKENS_AT_ONCE` tokens are multiplied at
once, in float32 and for the upper triangle alone (in panels of 512 rows: 9/16 of the square at a
width of 4096), and every such product is added to a float64 sum; the other triangle is its mirror
image, so the Hessian is symmetric to the bit. A float32 sum of n products is off by at most
n u / (1 - n u) of the sum of their magnitudes, u = 2^-24, in any order, fused or not (Higham,
Accuracy and Stability, section 3.1); so whatever the number of batches,

    |H_ij - (X^T X / tokens)_ij|  <=  2^-12 (|X|^T |X| / tokens)_ij  /  (1 - 2^-12)

and about the root of that as a rule: rounding errors do not all point in one direction. Inputs in
float16 and bfloat16 lose nothing, their products are exact in float32. Inputs in float64 are
multiplied in float64, and so are inputs so large that a square could leave float32. The bound is
that of IEEE arithmetic: it does not hold where torch was told to multiply in TF32.

Of several ranks each sums up its own tokens, and `join_` adds the sums. A float64 sum of n float32
numbers is exact while the largest is below 2^29 / n times the smallest, so that their order shows
in few entries, in the last bit. Where sums shall be those of one process to the bit in any case,
every rank is given all tokens in their order instead and adds to some panels of the Hessian, or to
some blocks of pairs, only: the others stay zero, and adding zeros is exact.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from mxtorq.errors import ModelError
from mxtorq.models.family import SiteName
from mxtorq.ranks import SOLO, Ranks, shares
from mxtorq.transforms.base import SiteStatistics

SAMPLE_TOKENS = 1024
"""Tokens kept for histograms and errors (all of them when there are fewer)."""

TOKENS_AT_ONCE = 4096
"""Terms of a float32 sum, at most."""

_PANEL = 512  # rows of the Hessian
_AMAX_ROWS = 64  # whose magnitudes stay in a core's cache
_LARGE = 2.0**57  # 4096 squares of this are 2^126


class SiteAccumulator:
    """Collects the inputs of one site."""

    def __init__(
        self,
        site: str,
        width: int,
        tokens: int,
        seed: int,
        hessian: bool = True,
        ranks: Ranks = SOLO,
        start: int = 0,
    ) -> None:
        """``start`` is where its tokens begin in the text."""
        draw = torch.Generator().manual_seed(seed)
        self._positions = torch.randperm(tokens, generator=draw)[:SAMPLE_TOKENS].sort().values
        self._site, self._ranks, self._start = site, ranks, start
        self._seen = self._next = 0
        side = width if hessian else 0
        self._sum = torch.zeros(side, side, dtype=torch.float64)  # its upper triangle
        self._amax = torch.zeros(width)
        self._sample: list[Tensor] = []
        self._sampled: list[Tensor] = []  # their positions
        panels = list(_panels(side))
        owners = shares([side - panel.start for panel in panels], ranks.size if ranks.exact else 1)
        mine = ranks.rank if ranks.exact else 0
        self._panels = [p for p, owner in zip(panels, owners, strict=True) if owner == mine]

    def seek(self, position: int) -> None:
        """What is added next stands there in the text."""
        self._next = position

    def add(self, inputs: Float[Tensor, "*tokens d"]) -> None:
        """Take in the next tokens' inputs.

        Raises:
            ModelError: one of them is NaN or Inf.
        """
        rows = inputs.flatten(0, -2)
        amax = _finite_amax(rows, self._site, self._start + self._next)
        self._sum, self._amax = self._sum.to(rows.device), self._amax.to(rows.device)
        self._amax = torch.maximum(self._amax, amax.float())
        if len(self._sum):
            for part in _summands(rows, amax):
                add_products_(self._sum, part, self._panels)
        positions = self._positions - self._next
        positions = positions[(positions >= 0) & (positions < len(rows))]
        self._sample.append(rows[positions.to(rows.device)].float())
        self._sampled.append(positions + self._next)
        self._seen += len(rows)
        self._next += len(rows)

    def join_(self) -> None:
        """Take in what the other ranks have added, each to its own; all of them have to call it."""
        self._sum = self._ranks.sum_(self._sum)
        if self._ranks.size == 1 or self._ranks.exact:  # it has seen every token
            return
        self._amax = self._ranks.max_(self._amax)
        self._seen = sum(self._ranks.all_json(self._seen))
        none = self._amax.new_empty(0, len(self._amax))
        rows = torch.cat(self._ranks.gather([torch.cat([none, *self._sample])]))
        places = torch.cat(self._ranks.gather([self._positions[:0], *self._sampled]))
        self._sample = [rows[places.argsort().to(rows.device)]]

    def take_hessian(self) -> Float64[Tensor, "d d"]:
        """The uncentred second moment of everything that was added. It ends here: at the width of
        14336 a second copy would be 1.6 GiB."""
        moment, self._sum = self._sum, self._sum.new_empty(0, 0)
        mirror_(moment)
        return moment.div_(self._seen)

    def finish(self, name: SiteName, weights: tuple[Tensor, ...]) -> SiteStatistics:
        """The statistics of everything that was added, for the linears with these weights."""
        return SiteStatistics(
            site=self._site,
            name=name,
            tokens=self._seen,
            second_moment=self.take_hessian() if len(self._sum) else None,
            amax=self._amax,
            sample=torch.cat(self._sample),
            weights=weights,
        )


class SplitAccumulator:
    """Collects the inputs of one site, those of the last tokens for themselves."""

    def __init__(
        self,
        site: str,
        width: int,
        tokens: int,
        held_out: int,
        seed: int,
        hessian: bool = True,
        ranks: Ranks = SOLO,
    ) -> None:
        """The last ``held_out`` of the ``tokens``; what is added at once is on one side."""
        self._boundary = tokens - held_out
        self._first = SiteAccumulator(site, width, self._boundary, seed, hessian, ranks)
        self._last = SiteAccumulator(site, width, held_out, seed, hessian, ranks, self._boundary)
        self._next = 0

    def seek(self, position: int) -> None:
        """What is added next stands there in the text."""
        self._next = position

    def add(self, inputs: Float[Tensor, "*tokens d"]) -> None:
        """As `SiteAccumulator.add`."""
        last = self._next >= self._boundary
        part = self._last if last else self._first
        part.seek(self._next - (self._boundary if last else 0))
        part.add(inputs)
        self._next += inputs.shape[:-1].numel()

    def join_(self) -> None:
        """As `SiteAccumulator.join_`."""
        self._first.join_()
        self._last.join_()

    def finish(
        self, name: SiteName, weights: tuple[Tensor, ...]
    ) -> tuple[SiteStatistics, SiteStatistics]:
        """The statistics of the first and of the last tokens."""
        return self._first.finish(name, weights), self._last.finish(name, weights)


class Pair(NamedTuple):
    """Second moments of inputs x^ that were x before a change, within a block of channels."""

    rounded: Float64[Tensor, "n n"]
    """E[x^^T x^]."""
    cross: Float64[Tensor, "n n"]
    """E[x^T x^]: the plain inputs' channels down the rows."""


class PairAccumulator:
    """Collects what inputs are before and after a change, block by block of their channels."""

    def __init__(
        self,
        site: str,
        width: int,
        size: int,
        both: Callable[[Tensor], tuple[Tensor, Tensor]],
        ranks: Ranks = SOLO,
    ) -> None:
        """Blocks of ``size`` channels, the last one of what is left; ``both`` gives inputs before
        and after from inputs as they come, in float32."""
        self._site, self._size, self._both, self._ranks = site, size, both, ranks
        self._seen = self._next = 0
        sides = [min(size, width - start) for start in range(0, width, size)]
        self._sums = [torch.zeros(2, side, side, dtype=torch.float64) for side in sides]
        owners = shares(sides, ranks.size if ranks.exact else 1)
        mine = ranks.rank if ranks.exact else 0
        self._mine = [owner == mine for owner in owners]

    def seek(self, position: int) -> None:
        """What is added next stands there in the text."""
        self._next = position

    def add(self, inputs: Float[Tensor, "*tokens d"]) -> None:
        """Take in the next tokens' inputs.

        Raises:
            ModelError: one of them is NaN or Inf, before or after the change.
        """
        before, after = self._both(inputs.flatten(0, -2))
        sides = [_finite_amax(rows, self._site, self._next) for rows in (before, after)]
        amax = sides[0].maximum(sides[1])
        self._sums = [sums.to(after.device) for sums in self._sums]
        for rows in zip(_summands(before, amax), _summands(after, amax), strict=True):
            blocks = zip(*(side.split(self._size, 1) for side in rows), strict=True)
            for sums, mine, (x, y) in zip(self._sums, self._mine, blocks, strict=True):
                if mine:
                    for total, left in zip(sums, (y, x), strict=True):
                        total += left.T @ y
        self._seen += len(after)
        self._next += len(after)

    def join_(self) -> None:
        """As `SiteAccumulator.join_`."""
        if self._ranks.size == 1:
            return
        every = self._ranks.sum_(torch.cat([sums.flatten() for sums in self._sums]))
        parts = every.split([sums.numel() for sums in self._sums])
        self._sums = [part.view_as(sums) for part, sums in zip(parts, self._sums, strict=True)]
        if not self._ranks.exact:
            self._seen = sum(self._ranks.all_json(self._seen))

    def finish(self) -> list[Pair]:
        """The moments of everything that was added, block by block. The sums end here."""
        sums, self._sums = self._sums, []
        return [Pair(*each.div_(self._seen)) for each in sums]


def _finite_amax(rows: Float[Tensor, "tokens d"], site: str, start: int) -> Float[Tensor, " d"]:
    """The largest magnitude of each channel.

    Raises:
        ModelError: one is NaN or Inf.
    """
    amax = channel_amax(rows)
    if not bool(torch.isfinite(amax).all()):  # a maximum keeps both
        raise ModelError(
            asked=f"the calibration activations of {site}",
            found=f"NaN or Inf within its tokens {start} to {start + len(rows) - 1}",
            why="nothing can be fitted to them, and the model itself is broken from here on",
            todo="evaluate the unquantized model first; an overflow in its original dtype or a "
            "damaged weight before this site are the usual causes",
        )
    return amax


def _summands(rows: Float[Tensor, "tokens d"], amax: Float[Tensor, " d"]) -> Iterator[Tensor]:
    """Rows that are multiplied at once, in float64 where a square could leave float32."""
    wide = rows.double() if float(amax.max()) > _LARGE else rows
    for part in wide.split(TOKENS_AT_ONCE):
        yield part if part.dtype == torch.float64 else part.float()


def channel_amax(rows: Float[Tensor, "tokens d"]) -> Float[Tensor, " d"]:
    """The largest magnitude of each channel; NaN where a channel holds one."""
    step = _AMAX_ROWS if rows.device.type == "cpu" else max(1, len(rows))
    amax = rows.new_zeros(rows.shape[1])
    for start in range(0, len(rows), step):
        amax = torch.maximum(amax, rows[start : start + step].abs().amax(0))
    return amax


def add_products_(
    total: Float64[Tensor, "d d"],
    rows: Float32[Tensor, "n d"] | Float64[Tensor, "n d"],
    panels: Sequence[slice] | None = None,
) -> None:
    """Add X^T X to the upper triangle of a sum. What is below its diagonal means nothing.

    ``panels`` are the rows of the sum to do; all of them unless given.
    """
    for panel in _panels(len(total)) if panels is None else panels:
        total[panel, panel.start :] += rows[:, panel].T @ rows[:, panel.start :]


def mirror_(total: Float64[Tensor, "d d"]) -> None:
    """Make a matrix symmetric, from its upper triangle."""
    for panel in _panels(len(total)):
        square = total[panel, panel]
        square.copy_(square.triu() + square.triu(1).T)
        total[panel.stop :, panel] = total[panel, panel.stop :].T


def _panels(width: int) -> Iterator[slice]:
    return (slice(start, min(start + _PANEL, width)) for start in range(0, width, _PANEL))
