"""TORQ's Macro-Equilibrium Rotation: Givens rotations that give every block the same variance.

With Sigma [B, B] the second moment between blocks, an orthogonal R with diag(R^T Sigma R) constant
exists by the Schur-Horn theorem (TORQ section 4.1, Theorem 4.1). Algorithm 1 builds it: take the
block i whose variance is farthest from the mean c and a block j on the other side of c, and rotate
the plane (i, j).

The angle decides everything. The one printed in the paper, theta = atan2(2 s_ij, s_ii - s_jj) / 2,
is Jacobi's: it drives the two variances *apart*, and stays in the tests as a control that must
fail. Here theta solves s_ii' = c exactly. The equation has a real root because i and j lie on
opposite sides of c, which is why the paper asks for that, and each rotation settles one block for
good: at most B - 1 rotations of O(B) work, the O(B^2) that the paper states.

The result stays a list of rotations and is applied as a chain: 6 operations an element instead of
2 B. Adding a multiple of I to Sigma, as implementations do, changes no angle and is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mxtorq.errors import FormatError

Angle = Callable[[float, float, float, float], tuple[float, float]]
"""(s_ii, s_jj, s_ij, c) -> (cos, sin) of the rotation in the plane (i, j)."""


def exact_target(s_ii: float, s_jj: float, s_ij: float, mean: float) -> tuple[float, float]:
    """The smaller rotation after which s_ii' = mean exactly.

    s_ii' = cos^2 s_ii + 2 sin cos s_ij + sin^2 s_jj = mean becomes, with t = tan theta,
    (s_jj - mean) t^2 + 2 s_ij t + (s_ii - mean) = 0; the root of smaller |t|, without cancellation.
    """
    a, b, d = s_jj - mean, s_ij, s_ii - mean
    q = -(b + np.copysign(np.sqrt(b * b - a * d), b))
    t = d / q
    cos = 1.0 / np.sqrt(1.0 + t * t)
    return float(cos), float(t * cos)


def pair_mean(s_ii: float, s_jj: float, s_ij: float, mean: float) -> tuple[float, float]:
    """The rotation after which both variances are their mean (a third-party port's correction).

    Settles nothing for good: it converges, in several times B rotations.
    """
    theta = 0.5 * np.arctan2(s_jj - s_ii, 2.0 * s_ij)
    return float(np.cos(theta)), float(np.sin(theta))


@dataclass(frozen=True, eq=False)
class GivensChain:
    """R = G_1 G_2 ... G_m in O(B); G has cos at (i,i), (j,j), -sin at (i,j) and sin at (j,i)."""

    first: Int64[Tensor, " m"]
    second: Int64[Tensor, " m"]
    cos: Float64[Tensor, " m"]
    sin: Float64[Tensor, " m"]

    def __post_init__(self) -> None:
        if self.first.numel() == 0:
            return
        unit = (self.cos.square() + self.sin.square() - 1).abs().max().item()
        if unit > 1e-14 or bool((self.first == self.second).any()) or int(self.first.min()) < 0:
            raise FormatError(
                asked="a chain of Givens rotations",
                found=f"planes {self.first.tolist()[:4]}, {self.second.tolist()[:4]}, ... and "
                f"cos^2 + sin^2 off 1 by {unit:.1e}",
                why="a rotation needs two different axes and a unit vector",
                todo="the stored chain is damaged: make the checkpoint anew",
            )

    def __len__(self) -> int:
        return len(self.first)

    def apply(
        self, blocks: Float[Tensor, "*tokens blocks width"]
    ) -> Float[Tensor, "*tokens blocks width"]:
        """R^T X: mixes whole blocks, position by position, in the dtype of ``blocks``."""
        out = blocks.clone()
        steps = zip(
            self.first.tolist(),
            self.second.tolist(),
            self.cos.tolist(),
            self.sin.tolist(),
            strict=True,
        )
        for i, j, cos, sin in steps:
            a, b = out[..., i, :], out[..., j, :]
            new_a = cos * a + sin * b
            out[..., j, :] = cos * b - sin * a
            out[..., i, :] = new_a
        return out

    def matrix(self, blocks: int) -> Float64[Tensor, "blocks blocks"]:
        """R as a dense matrix, for tests."""
        return self.apply(torch.eye(blocks, dtype=torch.float64)).T


EMPTY_CHAIN = GivensChain(
    torch.empty(0, dtype=torch.int64),
    torch.empty(0, dtype=torch.int64),
    torch.empty(0, dtype=torch.float64),
    torch.empty(0, dtype=torch.float64),
)
"""R = I: the inter-block level switched off."""


def equalize(
    second_moment: Float64[Tensor, "blocks blocks"],
    *,
    angle: Angle = exact_target,
    tolerance: float = 1e-13,
    max_rotations: int | None = None,
) -> GivensChain:
    """TORQ's Algorithm 1 in float64.

    Args:
        second_moment: Sigma, symmetric and positive semidefinite.
        angle: `exact_target` (ours), or `pair_mean` (the port's).
        tolerance: stop when every diagonal is within this of the mean, relative to the mean.
        max_rotations: stop there in any case; B - 1 unless given, which `exact_target` never
            needs to exceed.
    """
    sigma = second_moment.cpu().numpy().astype(np.float64, copy=True)
    blocks = len(sigma)
    mean = float(np.trace(sigma)) / blocks
    steps: list[tuple[int, int, float, float]] = []
    for _ in range(blocks - 1 if max_rotations is None else max_rotations):
        deviation = np.diagonal(sigma) - mean
        i = int(np.argmax(np.abs(deviation)))
        if abs(deviation[i]) <= tolerance * mean:
            break
        opposite = np.where(deviation * deviation[i] < 0, np.abs(deviation), 0.0)
        j = int(np.argmax(opposite))
        if opposite[j] == 0.0:  # only rounding is left: the deviations sum to zero
            break
        cos, sin = angle(sigma[i, i], sigma[j, j], sigma[i, j], mean)
        _rotate_plane(sigma, i, j, cos, sin)
        steps.append((i, j, cos, sin))
    if not steps:
        return EMPTY_CHAIN
    first, second, cosines, sines = zip(*steps, strict=True)
    return GivensChain(
        torch.tensor(first),
        torch.tensor(second),
        torch.tensor(cosines, dtype=torch.float64),
        torch.tensor(sines, dtype=torch.float64),
    )


def _rotate_plane(sigma: np.ndarray, i: int, j: int, cos: float, sin: float) -> None:
    """Sigma <- G^T Sigma G in place: two rows, then two columns."""
    sigma[i], sigma[j] = cos * sigma[i] + sin * sigma[j], cos * sigma[j] - sin * sigma[i]
    sigma[:, i], sigma[:, j] = (
        cos * sigma[:, i] + sin * sigma[:, j],
        cos * sigma[:, j] - sin * sigma[:, i],
    )
