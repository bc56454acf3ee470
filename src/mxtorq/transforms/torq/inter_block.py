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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from mxtorq.errors import FormatError, UsageError
from mxtorq.kernels.dispatch import Backend, pick

CHUNK = 2**14
"""Elements of one block that eager steps work on: enough to outweigh the microsecond that a step of
torch takes to start, few enough that two blocks and their scratch stay in a core's caches."""

_COMPILED = (torch.float32, torch.float64)
"""What the kernel computes in. torch rounds the half floats' sums its own way."""

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
        lowest = int(torch.minimum(self.first, self.second).min())
        if unit > 1e-14 or bool((self.first == self.second).any()) or lowest < 0:
            raise FormatError(
                asked="a chain of Givens rotations",
                found=f"planes {self.first.tolist()[:4]}, {self.second.tolist()[:4]}, ... and "
                f"cos^2 + sin^2 off 1 by {unit:.1e}",
                why="a rotation needs two different axes and a unit vector",
                todo="the stored chain is damaged: make the checkpoint anew",
            )

    def __len__(self) -> int:
        return len(self.first)

    @cached_property
    def reach(self) -> int:
        """The highest block that a rotation touches; -1 if there is no rotation."""
        return int(torch.maximum(self.first, self.second).max()) if len(self) else -1

    def apply(
        self,
        blocks: Float[Tensor, "*tokens blocks width"],
        *,
        backend: Backend | str = Backend.AUTO,
    ) -> Float[Tensor, "*tokens blocks width"]:
        """R^T X: mixes whole blocks, position by position, in the dtype of ``blocks``.

        numba serves float32 and float64 where no gradient is wanted; everything else is eager.

        Raises:
            FormatError: there are fewer blocks than the chain reaches.
            UsageError: numba was asked for by name and does not serve ``blocks``.
        """
        if self.reach >= blocks.shape[-2]:
            raise FormatError(
                asked=f"a chain of Givens rotations on {blocks.shape[-2]} blocks",
                found=f"a rotation of block {self.reach}",
                why="a rotation mixes blocks that are there",
                todo="apply the chain at the width of the input that it was fitted for",
            )
        flat = blocks.reshape(-1, *blocks.shape[-2:])
        if self._compiled(blocks, backend):
            from mxtorq.kernels.numba.givens import apply_chain

            out = apply_chain(flat.contiguous(), self.first, self.second, self.cos, self.sin)
        else:
            step = max(1, CHUNK // max(1, flat.shape[-1]))
            out = torch.cat([self._rotated(part) for part in flat.split(step)])
        return out.view(blocks.shape)

    def _compiled(self, blocks: Tensor, backend: Backend | str) -> bool:
        """Whether numba does it."""
        gradient = torch.is_grad_enabled() and blocks.requires_grad
        if pick(backend, blocks.device) is not Backend.NUMBA:
            return False
        if blocks.dtype in _COMPILED and not gradient:
            return True
        if Backend(backend) is Backend.AUTO:
            return False
        raise UsageError(
            asked="a chain of Givens rotations by numba",
            found=f"{blocks.dtype}{', with a gradient' if gradient else ''}",
            why="the kernel computes in float32 and float64, and has no derivative",
            todo="use backend='auto'",
        )

    def _rotated(self, blocks: Float[Tensor, "n blocks width"]) -> Tensor:
        rows = list(blocks.unbind(-2))
        for i, j, cos, sin in self._steps(blocks.dtype):
            a, b = rows[i], rows[j]
            rows[i], rows[j] = (cos * a).add_(sin * b), (cos * b).sub_(sin * a)
        return torch.stack(rows, -2)

    def _steps(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Any, Any]]:
        # A tensor of the right dtype meets another in half the time that a Python number takes.
        # The same bits, but not for half floats: there torch computes with the float32 number.
        turns: list[Any] = [self.cos.tolist(), self.sin.tolist()]
        if dtype in _COMPILED:
            turns = [part.cpu().to(dtype).unbind() for part in (self.cos, self.sin)]
        return zip(self.first.tolist(), self.second.tolist(), *turns, strict=True)

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
    backend: Backend | str = Backend.AUTO,
) -> GivensChain:
    """TORQ's Algorithm 1 in float64.

    Args:
        second_moment: Sigma, symmetric and positive semidefinite.
        angle: `exact_target` (ours), or `pair_mean` (the port's).
        tolerance: stop when every diagonal is within this of the mean, relative to the mean.
        max_rotations: stop there in any case; B - 1 unless given, which `exact_target` never
            needs to exceed.
        backend: numba serves `exact_target`; other angles are Python functions, so NumPy's.
    """
    sigma = second_moment.cpu().numpy()
    most = len(sigma) - 1 if max_rotations is None else max_rotations
    compiled = pick(backend, torch.device("cpu")) is Backend.NUMBA
    if compiled and angle is exact_target:
        from mxtorq.kernels.numba import givens

        parts: tuple[NDArray[Any], ...] = givens.equalize(sigma, tolerance, most)
    else:
        parts = _equalize(sigma, angle, tolerance, most)
    return GivensChain(*(torch.from_numpy(part.copy()) for part in parts))


def _equalize(
    second_moment: NDArray[np.float64], angle: Angle, tolerance: float, max_rotations: int
) -> tuple[NDArray[Any], ...]:
    """first, second, cos, sin of the rotations."""
    sigma = second_moment.copy()
    mean = float(np.trace(sigma)) / len(sigma)
    steps: list[tuple[int, int, float, float]] = []
    while len(steps) < max_rotations:
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
    planes = np.array([step[:2] for step in steps], dtype=np.int64).reshape(-1, 2)
    turns = np.array([step[2:] for step in steps], dtype=np.float64).reshape(-1, 2)
    return (*planes.T, *turns.T)


def _rotate_plane(sigma: NDArray[np.float64], i: int, j: int, cos: float, sin: float) -> None:
    """Sigma <- G^T Sigma G in place: two rows, then two columns."""
    sigma[i], sigma[j] = cos * sigma[i] + sin * sigma[j], cos * sigma[j] - sin * sigma[i]
    sigma[:, i], sigma[:, j] = (
        cos * sigma[:, i] + sin * sigma[:, j],
        cos * sigma[:, j] - sin * sigma[:, i],
    )
