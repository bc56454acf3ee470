"""Multiply a few tokens with a packed MXFP4 weight, which is read as it is stored.

A row of the weight is decoded into a core's first cache, and all tokens meet it there: 4.25 bits a
number are read where a dequantized copy has to be written and read again in 32. The more tokens
there are, the less that matters, and from some number on a matrix product over a dequantized weight
is faster: `LIMIT`, see docs/results/bench.md.

Products of MXFP4 numbers are exact in float32. Sums are float32, each lane for itself and then lane
onto lane: another order than a BLAS has, within the same bound.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.numba.compile import kernel
from mxtorq.kernels.numba.lanes import (
    decode,
    fma,
    half_power,
    lanes_sum,
    load,
    load_packed,
    spread,
    store,
)
from mxtorq.kernels.numba.mxfp4 import bits_of
from mxtorq.kernels.numba.pool import over_rows

LIMIT = 16
"""Tokens up to which the packed weight is multiplied directly."""

_LEAST_ROWS = 16


@kernel
def _multiply(
    tokens: Any, count: int, packed: Any, scales: Any, out: Any, start: int, stop: int
) -> None:
    wide = scales.shape[1]
    line = np.empty((wide, 32), np.int32)
    for row in range(start, stop):
        for place in range(wide):
            half = half_power(np.int32(scales[row, place]))
            store(line, place, decode(load_packed(packed, row * wide + place), half))
        for token in range(0, count, 2):
            other = min(token + 1, count - 1)
            first, second = spread(np.float32(0)), spread(np.float32(0))
            for place in range(wide):
                weight = load(line, place)
                first = fma(load(tokens, token * wide + place), weight, first)
                second = fma(load(tokens, other * wide + place), weight, second)
            out[token, row] = lanes_sum(first)
            out[other, row] = lanes_sum(second)


def multiply(
    activations: Float32[Tensor, "*tokens d"], weight: MXFP4, bias: Tensor | None = None
) -> Float32[Tensor, "*tokens d_out"]:
    """x W^T + b, W as its codes."""
    *rows, width = activations.shape
    tokens = activations.reshape(-1, width)
    out = torch.empty(len(tokens), len(weight.packed))
    arrays = (
        bits_of(tokens.view(-1, BLOCK)),
        len(tokens),
        weight.packed.reshape(-1, BLOCK // 2).numpy(),
        weight.e8m0.contiguous().numpy(),
        out.numpy(),
    )
    over_rows(lambda start, stop: _multiply(*arrays, start, stop), len(weight.packed), _LEAST_ROWS)
    if bias is not None:
        out += bias
    return out.view(*rows, len(weight.packed))
