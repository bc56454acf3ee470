"""GPTQ's inner step: a group of 32 columns, rounded one by one, each with what the others left.

    for column j in order:   multiple = w_j / s;  q_j = nearest(multiple);  e_j = w_j - q_j s
        for k in j+1 .. 31:  w_k = w_k - follow_jk e_j

All in float32, and every operation is rounded by itself: q_j s before its difference, follow_jk e_j
before its. A fused multiply-add would round once where this rounds twice, and a weight next to a
cut would get another code. Which library fuses where is nobody's promise, so products and
differences are calls of their own here, and compiled versions switch fusing off. That is what makes
the codes of all backends the same bits.
"""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from mxtorq.formats import e2m1
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import block_scales
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import Backend, pick_able


def fix_group_(
    columns: Float32[Tensor, "32 rows"],
    follow: Float32[Tensor, "32 32"],
    scales: Float32[Tensor, "blocks rows"],
    groups: list[int],
    rule: ScaleRule | None,
    backend: Backend | str = Backend.AUTO,
) -> UInt8[Tensor, "32 rows"]:
    """Round a group: its columns become the values of the codes that are returned.

    Args:
        columns: the weights, one column of the weight a row, in the order of rounding.
        follow: above its diagonal, how much of column j's error is taken from column k.
        scales: of all groups; read, or written where ``rule`` chooses.
        groups: the row of ``scales`` that each column has.
        rule: chooses the scale from the columns as they come, which then are one group's; None
            takes the scales that are there.
        backend: who computes. Triton has no kernel for columns of several groups, which a
            descending order brings together.
    """
    able = (Backend.NUMBA, Backend.TRITON) if len(set(groups)) == 1 else (Backend.NUMBA,)
    chosen = pick_able(backend, columns.device, able)
    if chosen is Backend.NUMBA:
        from mxtorq.kernels.numba import gptq

        return gptq.fix_group_(columns, follow, scales, groups, rule)
    if chosen is Backend.TRITON:
        from mxtorq.kernels.triton.gptq import round_group_

        scale = scales[groups[0]]
        round_group_(columns, follow, torch.empty_like(columns), scale, rule)
        codes = e2m1.encode(columns)
        columns.copy_(e2m1.nearest(columns) * scale)
        return codes
    if rule is not None:
        scales[groups[0]] = block_scales(columns.T.contiguous(), rule)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    for j in range(BLOCK):
        scale = scales[groups[j]]
        multiple = columns[j] / scale
        codes[j] = e2m1.encode(multiple)
        value = e2m1.nearest(multiple) * scale
        error = columns[j] - value
        columns[j] = value
        columns[j + 1 :] -= follow[j, j + 1 :, None] * error
    return codes
