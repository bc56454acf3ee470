"""HiRes' options and its fit for one input site.

Faithful to what is known of stage I: T = P (I + K)^T H D (its transpose in the paper's columns)
with A and B each plus 1 % of their mean diagonal, Cap_8, the anchor pass under the Hadamard, two
folds, norm 1/8, determinant 1, the balance in groups of 4 and its trial of u, u/2 and 0 by real
re-encoding. The authors' code and the full appendix could not be had; the formulas are known from
notes on the paper.

Decided here: errors are Q(v) - v, and the balance's factor is 1/4 (both derived in `geometry`). By
choice: folds are even and odd rows of the token sample and of the stacked weight, where the paper
takes sequences for tokens; c and h are means over both folds; the thresholds' weights 1/2, 1/2 and
1; the curvature of a pair's two parts is the mean of its two entries'; the sample stands for the
calibration text except in A. The balance is tried with round-to-nearest, where the paper includes
GPTQ: a trial counts the block's own output error on the sample.

Not to be expected: more than WUSH gives. Cap_8 limits how far an outlier channel can be moved into
the weights, and on synthetic data K and D together gain 1 to 3 % with round-to-nearest weights and
nothing that could be told from noise with GPTQ (docs/methods/hires.md). What the paper gains over
WUSH may lie in stages II and III.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import fake_quantize
from mxtorq.transforms.base import SiteStatistics, TransformMethod
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.hires import geometry
from mxtorq.transforms.wush import input_moments, weight_moments

STEPS = (1.0, 0.5)
"""Parts of the balance that are tried, in this order, before it is left out."""


@dataclass(frozen=True, kw_only=True)
class HiRes(TransformMethod):
    """Stage I of HiRes: reference coordinates, interaction, Hadamard, balance."""

    interaction: bool = True
    """False: K = 0."""
    balance: bool = True
    """False: D = I."""
    scale: ScaleRule = ScaleRule.FLOOR
    """The rule under which errors are measured: the one that the model will be rounded with."""

    def fit(self, statistics: SiteStatistics, seed: int) -> BlockMatrices:
        references = geometry.reference(
            geometry.ridged(input_moments(statistics)), geometry.ridged(weight_moments(statistics))
        )
        if not (self.interaction or self.balance):
            return BlockMatrices(references @ sylvester(BLOCK).to(references.device))
        inputs = statistics.sample.split(BLOCK, -1)
        weights = statistics.weight.split(BLOCK, -1)
        return BlockMatrices(
            torch.stack(
                [self._fit_block(*block) for block in zip(references, inputs, weights, strict=True)]
            )
        )

    def _fit_block(self, reference: Tensor, sample: Tensor, weight: Tensor) -> Tensor:
        """T = P (I + K)^T H D with I + K scaled to determinant 1."""
        hadamard = sylvester(BLOCK).to(reference.device)
        x, w = sample.double(), weight
        matrix = reference
        if self.interaction:
            y, v = x @ reference, torch.linalg.solve(reference, w.T).T
            # Rounded under the Hadamard, errors brought back by its inverse, itself.
            k = geometry.interaction(
                y,
                v,
                (self._rounded(y @ hadamard) @ hadamard) - y,
                (self._rounded(v @ hadamard) @ hadamard) - v,
            )
            identity = torch.eye(BLOCK, dtype=k.dtype, device=k.device)
            matrix = reference @ geometry.unit_determinant(identity + k).T
        matrix = matrix @ hadamard
        if self.balance:
            matrix = matrix * self._balance(x @ matrix, torch.linalg.solve(matrix, w.T).T)
        return matrix

    def _balance(self, y: Tensor, v: Tensor) -> Tensor:
        y_rounded, v_rounded = self._rounded(y), self._rounded(v)
        exponents = geometry.balance(y, v, y_rounded - y, v_rounded - v)
        plain = product_error(y, v, y_rounded, v_rounded)
        for step in STEPS:
            factors = torch.exp2(step * exponents)
            y_new, v_new = y * factors, v / factors
            if product_error(y_new, v_new, self._rounded(y_new), self._rounded(v_new)) <= plain:
                return factors
        return torch.ones_like(exponents)

    def _rounded(self, rows: Tensor) -> Tensor:
        return fake_quantize(rows.float(), self.scale).double()


def product_error(
    inputs: Float64[Tensor, "n q"],
    weights: Float64[Tensor, "m q"],
    rounded_inputs: Float64[Tensor, "n q"],
    rounded_weights: Float64[Tensor, "m q"],
) -> Float64[Tensor, ""]:
    """The sum of squares of Q(X) Q(W)^T - X W^T without that product of n by m numbers.

    It is (Q(X), X) (Q(W), -W)^T, whose squared norm is the trace of a product of two Gram matrices
    of size 2q.
    """
    left = torch.cat((rounded_inputs, inputs), 1)
    right = torch.cat((rounded_weights, -weights), 1)
    return ((left.T @ left) * (right.T @ right)).sum()
