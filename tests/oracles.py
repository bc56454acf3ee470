"""Slow and obvious versions that fast code is judged by, and data with the defects TORQ names."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mxtorq.formats import mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.models.family import SiteName
from mxtorq.transforms.base import Judgement, SiteStatistics

CUTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def spd(size: int, spread: float, seed: int) -> torch.Tensor:
    """A random symmetric positive definite matrix whose diagonal spans ``spread``, float64."""
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(size, 2 * size, dtype=torch.float64, generator=draw)
    scale = spread ** torch.rand(size, dtype=torch.float64, generator=draw)
    root = root * scale.sqrt()[:, None]
    return root @ root.T / (2 * size)


def givens(size: int, i: int, j: int, cos: float, sin: float) -> torch.Tensor:
    """G as a dense matrix: G_ii = G_jj = cos, G_ij = -sin, G_ji = sin."""
    matrix = torch.eye(size, dtype=torch.float64)
    matrix[i, i] = matrix[j, j] = cos
    matrix[i, j], matrix[j, i] = -sin, sin
    return matrix


def occupancy(column: np.ndarray) -> np.ndarray:
    """How many magnitudes of a column round to each of the 8 codes, ties to the even code."""
    count = np.zeros(8, dtype=np.int64)
    for value in np.abs(column):
        code = sum(value > cut or (value == cut and at % 2 == 1) for at, cut in enumerate(CUTS))
        count[code] += 1
    return count


def pair_squares(u: np.ndarray, v: np.ndarray, theta: float) -> int:
    """Sum of squared counts of both columns after rotating the pair by theta."""
    rotated = (
        u * np.cos(theta) - v * np.sin(theta),
        u * np.sin(theta) + v * np.cos(theta),
    )
    return int(sum((occupancy(column) ** 2).sum() for column in rotated))


def activations(tokens: int, width: int, outliers: int, seed: int) -> torch.Tensor:
    """Gaussian rows, float32, with ``outliers`` channels 10 to 40 times as large."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, width, generator=draw)
    where = torch.randperm(width, generator=draw)[:outliers]
    rows[:, where] *= 10 + 30 * torch.rand(outliers, generator=draw)
    return rows


def site(
    rows: torch.Tensor, *weights: torch.Tensor, name: SiteName = SiteName.DOWN_IN
) -> SiteStatistics:
    """A site with these inputs, all of them in the sample, and these readers."""
    wide = rows.double()
    return SiteStatistics(
        site=f"model.layers.0.{name}",
        name=name,
        tokens=len(rows),
        second_moment=wide.T @ wide / len(rows),
        amax=rows.abs().amax(0),
        sample=rows,
        weights=weights,
    )


def statistics(width: int = 160, *, tokens: int = 300, rows: int = 48) -> SiteStatistics:
    """A site with outlier channels and two random readers."""
    draw = torch.Generator().manual_seed(8)
    weight = torch.randn(2 * rows, width, generator=draw)
    return site(activations(tokens, width, outliers=4, seed=7), weight[:rows], weight[rows:])


def judged(seen: SiteStatistics, **changes: Any) -> SiteStatistics:
    """The statistics with something to judge by, for a method that chooses.

    Held-out inputs as loud as the sample is, gradients by which some channels hardly count, outputs
    of different worth, round-to-nearest, and a target that runs everything. ``changes`` are fields
    of `Judgement`.
    """
    draw = torch.Generator().manual_seed(9)
    loud = seen.sample.square().mean(0).sqrt()
    outputs = sum(map(len, seen.weights))
    matter = torch.randn(seen.width, generator=draw).exp()
    fields: dict[str, Any] = {
        "held_out": torch.randn(96, seen.width, generator=draw) * loud,
        "gradients": torch.randn(200, seen.width, generator=draw) * matter,
        "held_out_gradients": torch.randn(150, seen.width, generator=draw) * matter,
        "output_weights": torch.rand(outputs, generator=draw, dtype=torch.float64),
        "activations": ScaleRule.FLOOR,
        "corrected": False,
        "rounded": lambda weight, moment: mxfp4.fake_quantize(weight),
        "runs": lambda transform: True,
        "stock": lambda transform: transform.kind in ("identity", "block-rotation"),
    }
    return replace(seen, judgement=Judgement(**{**fields, **changes}))


def rounding_problem(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight to round, and a Hessian of few directions and channels of very different size."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=draw) * 0.02
    few = torch.randn(width // 3, width, dtype=torch.float64, generator=draw)
    loud = torch.exp2(torch.randn(width, dtype=torch.float64, generator=draw))
    moment = (few.T @ few / len(few) + 0.05 * torch.eye(width)) * loud[:, None] * loud
    return weight, (moment + moment.T) / 2
