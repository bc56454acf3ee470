"""SpinQuant: the rotations of QuaRot, learned with the quantized network's own loss.

SpinQuant (arXiv 2405.16406) starts from random Hadamard matrices R1 (residual stream) and R2 (one
a layer, of its heads), both merged into weights, and lowers the loss of the network with rounded
activations by Cayley SGD (arXiv 2002.01113): with the gradient G, W = (R^T G - G^T R) / 2 and a
step a = min(learning_rate, 1 / |W|_1),

    R <- R (I - a/2 W) (I + a/2 W)^-1,

which stays orthogonal, as W is skew. The Hadamard before down_proj (R4) is online, not learned.

Faithful: start, loss (rounded activations and unrounded weights, which the release advises where
GPTQ rounds the weights afterwards; see `surgery.network`), 100 steps, learning rate 1.5, no
momentum, the cap on the step, and the last iterate rather than the best one: with one window a
step, the losses of different steps are not comparable.

Decided here: the rate falls linearly to 0 (the paper's words; the released scripts say cosine); the
Cayley transform is solved exactly in float64, where the release iterates five times in float32 and
repairs the drift by random QR steps; a step sees ``batch`` windows in the order of a seeded
shuffle (the release: one on each of 8 GPUs, 800 windows of 2048 tokens in all); a last polar
projection removes the rounding errors of all steps. R3, which rotates queries and keys, serves a
quantized KV cache and is left out.

Why no library: geoopt's Stiefel manifold imports with a deprecation warning under current torch and
knows no cap on the step, and torch's Cayley parametrization walks from one fixed base point, which
is another algorithm; the step itself is one linear solve.

Price: steps x batch forward and backward passes of the whole model, and one solve of hidden size a
step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from mxtorq.errors import ModelError, UsageError
from mxtorq.models.family import SiteName
from mxtorq.transforms.base import (
    Network,
    NetworkShape,
    OfflineRotations,
    SiteStatistics,
    TransformMethod,
)
from mxtorq.transforms.kronecker import KroneckerRotation
from mxtorq.transforms.quarot import full_hadamard, require_hadamards
from mxtorq.transforms.rotation import BlockRotation, Identity


@dataclass(frozen=True, kw_only=True)
class SpinQuant(TransformMethod):
    """Learned rotations of the residual stream and of heads; Hadamard before down_proj."""

    needs_hessian: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False

    steps: int = 100
    learning_rate: float = 1.5
    batch: int = 1
    """Calibration windows a step."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or not 0 < self.learning_rate < float("inf"):
            raise UsageError(
                asked=f"{self}",
                found=f"steps={self.steps}, batch={self.batch}, learning_rate={self.learning_rate}",
                why="a step needs a window and a positive, finite rate",
                todo="the paper uses steps=100 and learning_rate=1.5",
            )

    def check(self, shape: NetworkShape) -> None:
        require_hadamards(shape)
        if not shape.sites.keys() - {SiteName.DOWN_IN}:
            raise UsageError(
                asked=f"{self}",
                found=f"the quantized sites {', '.join(shape.sites) or 'none'}",
                why="merged rotations reach none of them, so that there is nothing to learn",
                todo="use `hadamard` or `torq`, which rotate each input by itself",
            )

    def rotations(self, network: Network, seed: int) -> OfflineRotations:
        shape = network.shape
        if network.windows < 1:
            raise UsageError(
                asked=f"{self}",
                found="no calibration window",
                why="the rotations are learned from the loss on calibration text",
                todo="calibrate with at least one window",
            )
        draw = torch.Generator().manual_seed(seed)
        widths = [shape.hidden, *[shape.head_dim] * shape.layers]
        start = [full_hadamard(width, draw).matrix() for width in widths]
        residual, *heads = self._learn(network, start, draw)
        return OfflineRotations(
            residual=BlockRotation(shape.hidden, residual),
            heads=tuple(BlockRotation(shape.head_dim, head) for head in heads),
        )

    def fit(self, statistics: SiteStatistics, seed: int) -> KroneckerRotation | Identity:
        if statistics.name is SiteName.DOWN_IN:
            return full_hadamard(statistics.width)
        return Identity(statistics.width)

    def _learn(
        self, network: Network, matrices: list[Tensor], draw: torch.Generator
    ) -> list[Tensor]:
        down = network.shape.sites.get(SiteName.DOWN_IN)
        online = {} if down is None else {SiteName.DOWN_IN: full_hadamard(down)}
        order = _shuffles(network.windows, draw)
        for step in range(self.steps):
            rate = self.learning_rate * (1 - step / self.steps)
            for matrix in matrices:
                matrix.requires_grad_()
            for _ in range(self.batch):  # one by one: a graph of one window in memory
                loss = network.loss(matrices[0], matrices[1:], online, [next(order)])
                _require_finite(loss, step)
                (loss / self.batch).backward()
            network.progress(step + 1, self.steps)
            # Without a gradient: heads or a stream that no quantized site reads.
            matrices = [
                matrix.detach()
                if matrix.grad is None
                else cayley_step(matrix.detach(), matrix.grad, rate)
                for matrix in matrices
            ]
        return [nearest_orthogonal(matrix) for matrix in matrices]


def cayley_step(
    rotation: Float64[Tensor, "n n"], gradient: Float64[Tensor, "n n"], rate: float
) -> Float64[Tensor, "n n"]:
    """One step of Cayley SGD: against the gradient, along the orthogonal matrices.

    The step is shortened to 1 / |W|_1 (the largest column sum) where that is less than ``rate``.
    """
    inner = rotation.T @ gradient
    skew = (inner - inner.T) / 2
    norm = skew.abs().sum(0).max().item()
    half = skew * (min(rate, 1 / norm if norm > 0 else rate) / 2)
    identity = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    moved: Tensor = torch.linalg.solve(identity + half, rotation @ (identity - half), left=False)
    return moved


def nearest_orthogonal(matrix: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """The orthogonal factor of the polar decomposition."""
    left, _, right = torch.linalg.svd(matrix)
    nearest: Tensor = left @ right
    return nearest


def _shuffles(count: int, draw: torch.Generator) -> Iterator[int]:
    """0 to count - 1 in random order, again and again."""
    while True:
        yield from torch.randperm(count, generator=draw).tolist()


def _require_finite(loss: Tensor, step: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise ModelError(
            asked="rotations that lower the loss of the quantized network",
            found=f"the loss {loss.item()} at step {step}",
            why="rotations stay orthogonal whatever the learning rate is, so the network itself "
            "yields NaN or Inf on a calibration window",
            todo="evaluate the unquantized model on the calibration text first",
        )
