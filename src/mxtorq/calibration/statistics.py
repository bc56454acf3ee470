"""Sums over calibration tokens for one input site, filled batch by batch.

One Hessian serves every method and every rounding: TORQ's Sigma is its partial trace, GPTQ's
matrix is its rotation. It is summed in float64. A uniform sample of tokens is kept beside it for
what moments cannot tell (codeword histograms, output errors); its positions are drawn beforehand,
so that it does not depend on the batch size.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.errors import ModelError
from mxtorq.models.family import SiteName
from mxtorq.transforms.base import SiteStatistics

SAMPLE_TOKENS = 1024
"""Tokens kept for histograms and errors (all of them when there are fewer)."""


class SiteAccumulator:
    """Collects the inputs of one site."""

    def __init__(self, site: str, width: int, tokens: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self._positions = torch.randperm(tokens, generator=draw)[:SAMPLE_TOKENS].sort().values
        self._site, self._seen = site, 0
        self._sum = torch.zeros(width, width, dtype=torch.float64)
        self._amax = torch.zeros(width)
        self._sample: list[Tensor] = []

    def add(self, inputs: Float[Tensor, "*tokens d"]) -> None:
        """Take in the next tokens' inputs.

        Raises:
            ModelError: one of them is NaN or Inf.
        """
        rows = inputs.flatten(0, -2)
        if not bool(torch.isfinite(rows).all()):
            raise ModelError(
                asked=f"the calibration activations of {self._site}",
                found=f"NaN or Inf within its tokens {self._seen} to {self._seen + len(rows) - 1}",
                why="nothing can be fitted to them, and the model itself is broken from here on",
                todo="evaluate the unquantized model first; an overflow in its original dtype or a "
                "damaged weight before this site are the usual causes",
            )
        wide = rows.double()
        self._sum = self._sum.to(rows.device).addmm_(wide.T, wide)
        self._amax = torch.maximum(self._amax.to(rows.device), rows.abs().amax(0).float())
        here = (self._positions >= self._seen) & (self._positions < self._seen + len(rows))
        self._sample.append(rows[(self._positions[here] - self._seen).to(rows.device)].float())
        self._seen += len(rows)

    @property
    def hessian(self) -> Float64[Tensor, "d d"]:
        """The uncentred second moment of everything that was added."""
        return self._sum / self._seen

    def finish(self, name: SiteName, weights: tuple[Tensor, ...]) -> SiteStatistics:
        """The statistics of everything that was added, for the linears with these weights."""
        return SiteStatistics(
            site=self._site,
            name=name,
            tokens=self._seen,
            hessian=self.hessian,
            amax=self._amax,
            sample=torch.cat(self._sample),
            weights=weights,
        )
