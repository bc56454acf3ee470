"""Givens rotations in numba: a chain of them on blocks, and TORQ's Algorithm 1 that finds one.

A token's blocks stay in a core's cache while all rotations pass over them, which eager torch cannot
arrange: it goes through many tokens rotation by rotation. What is computed, and why, stands in
`transforms.torq.inter_block`; here are its operations in its order, so the bits are the same.
Indices are not checked: whoever calls has seen that they lie inside.
"""

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from mxtorq.formats.mxfp4 import fresh
from mxtorq.kernels.numba.compile import kernel
from mxtorq.kernels.numba.pool import over_rows

_WORTH_A_THREAD = 2**16
"""Elements times rotations below which a second thread costs more than it saves."""

_TOGETHER = 4
"""Tokens that a core works on at a time: 432 KiB of float32 at 864 blocks of 32."""

Chain = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""first, second, cos, sin of the rotations, in order."""


def apply_chain(
    blocks: Float[Tensor, "tokens blocks width"],
    first: Int64[Tensor, " m"],
    second: Int64[Tensor, " m"],
    cos: Float64[Tensor, " m"],
    sin: Float64[Tensor, " m"],
) -> Float[Tensor, "tokens blocks width"]:
    """R^T X for each token, as a new tensor; arguments as for `apply_chain_`."""
    out = fresh(blocks.shape, blocks.dtype, blocks.device)
    _over_tokens(blocks, out, first, second, cos, sin)
    return out


def apply_chain_(
    blocks: Float[Tensor, "tokens blocks width"],
    first: Int64[Tensor, " m"],
    second: Int64[Tensor, " m"],
    cos: Float64[Tensor, " m"],
    sin: Float64[Tensor, " m"],
) -> None:
    """R^T X for each token, in place.

    Args:
        blocks: float32 or float64 on the CPU, contiguous, no gradient wanted.
        first: i of each rotation, from 0 to blocks - 1.
        second: j of each rotation, from 0 to blocks - 1.
        cos: rounded to the dtype of ``blocks``, as torch rounds a number that meets a tensor.
        sin: likewise.
    """
    _over_tokens(blocks, blocks, first, second, cos, sin)


def _over_tokens(
    blocks: Tensor, out: Tensor, first: Tensor, second: Tensor, cos: Tensor, sin: Tensor
) -> None:
    values, results = blocks.detach().numpy(), out.detach().numpy()
    axes = first.cpu().numpy(), second.cpu().numpy()
    turns = [part.cpu().to(blocks.dtype).numpy() for part in (cos, sin)]
    work = max(1, len(first) * values.shape[2])
    over_rows(
        lambda start, stop: _apply_chain(values[start:stop], results[start:stop], *axes, *turns),
        len(values),
        least=-(-_WORTH_A_THREAD // work),
    )


def equalize(
    second_moment: Float64[np.ndarray, "blocks blocks"], tolerance: float, max_rotations: int
) -> Chain:
    """TORQ's Algorithm 1 with the angle that settles one block for good.

    Args:
        second_moment: left as it is.
        tolerance: of a diagonal entry, relative to the mean.
        max_rotations: stop there in any case.
    """
    sigma = np.array(second_moment, order="C")
    mean = float(np.trace(sigma)) / len(sigma)
    axes = np.empty((2, max_rotations), dtype=np.int64)
    turns = np.empty((2, max_rotations))
    steps = _equalize(sigma, mean, tolerance * mean, axes, turns)
    return axes[0, :steps], axes[1, :steps], turns[0, :steps], turns[1, :steps]


@kernel
def _apply_chain(values, out, first, second, cos, sin):  # type: ignore[no-untyped-def]
    tokens, blocks, width = values.shape
    together = _TOGETHER  # a block of several tokens is one long row: fewer, longer loops
    rows = np.empty((blocks, together * width), values.dtype)
    for start in range(0, tokens, together):
        here = min(together, tokens - start)
        for token in range(here):
            for block in range(blocks):
                for at in range(width):
                    rows[block, token * width + at] = values[start + token, block, at]
        for step in range(len(first)):
            a, b = rows[first[step]], rows[second[step]]
            c, s = cos[step], sin[step]
            for at in range(here * width):
                x, y = a[at], b[at]
                a[at] = c * x + s * y
                b[at] = c * y - s * x
        for token in range(here):
            for block in range(blocks):
                for at in range(width):
                    out[start + token, block, at] = rows[block, token * width + at]


@kernel
def _equalize(sigma, mean, close, axes, turns):  # type: ignore[no-untyped-def]
    blocks = len(sigma)
    deviation = np.empty(blocks)
    for step in range(axes.shape[1]):
        i = 0
        for k in range(blocks):
            deviation[k] = sigma[k, k] - mean
            if np.isnan(deviation[k]):  # NumPy's argmax stops at it, and finds no opposite
                return step
            if abs(deviation[k]) > abs(deviation[i]):
                i = k
        if abs(deviation[i]) <= close:
            return step
        j, opposite = 0, 0.0
        for k in range(blocks):
            if deviation[k] * deviation[i] < 0 and abs(deviation[k]) > opposite:
                j, opposite = k, abs(deviation[k])
        if opposite == 0.0:
            return step
        a, b, d = sigma[j, j] - mean, sigma[i, j], sigma[i, i] - mean
        q = -(b + np.copysign(np.sqrt(b * b - a * d), b))
        t = d / q
        c = 1.0 / np.sqrt(1.0 + t * t)
        s = t * c
        axes[0, step], axes[1, step] = i, j
        turns[0, step], turns[1, step] = c, s
        for k in range(blocks):
            x, y = sigma[i, k], sigma[j, k]
            sigma[i, k], sigma[j, k] = c * x + s * y, c * y - s * x
        for k in range(blocks):
            x, y = sigma[k, i], sigma[k, j]
            sigma[k, i], sigma[k, j] = c * x + s * y, c * y - s * x
    return axes.shape[1]
