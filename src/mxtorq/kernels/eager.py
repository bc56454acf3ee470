"""Block rotations in torch alone, in chunks of tokens that stay in a core's caches between steps.

Rounding itself is eager in `formats.mxfp4`, which these functions call.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mxtorq.formats import mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, as_blocks, check_out, chunks
from mxtorq.formats.spec import BLOCK

_DTYPES = (torch.float32, torch.bfloat16)


def rotate(
    values: Float[Tensor, "*rows d"],
    matrices: Float[Tensor, "m 32 32"],
    out: Float[Tensor, "*rows d"] | None = None,
) -> Float[Tensor, "*rows d"]:
    """`dispatch.rotate`; differentiable when there is no ``out``."""
    matrices = matrices.to(values.dtype)
    if out is None and torch.is_grad_enabled() and values.requires_grad:
        return _rotated(values.reshape(-1, len(matrices), BLOCK), matrices).view(values.shape)
    result = check_out(out, values.shape, values.dtype, values.device)
    tokens, target = (t.reshape(-1, len(matrices), BLOCK) for t in (values, result))
    for here in chunks(tokens, len(matrices)):
        target[here] = _rotated(tokens[here], matrices)
    return result


def rotate_fake_quantize(
    values: Float[Tensor, "*rows d"],
    matrices: Float[Tensor, "m 32 32"],
    rule: ScaleRule = ScaleRule.FLOOR,
    out: Float[Tensor, "*rows d"] | None = None,
) -> Float[Tensor, "*rows d"]:
    """`dispatch.rotate_fake_quantize`."""
    as_blocks(values, _DTYPES)
    result = check_out(out, values.shape, values.dtype, values.device)
    tokens, target = (t.reshape(-1, len(matrices), BLOCK) for t in (values, result))
    matrices = matrices.float()
    for here in chunks(tokens, len(matrices)):
        rotated = _rotated(tokens[here].float(), matrices)
        target[here] = mxfp4.fake_quantize(rotated, rule, rotated)
    return result


def rotate_quantize(
    values: Float[Tensor, "*rows d"],
    matrices: Float[Tensor, "m 32 32"],
    rule: ScaleRule = ScaleRule.FLOOR,
) -> MXFP4:
    """`dispatch.rotate_quantize`."""
    blocks = as_blocks(values, _DTYPES)
    packed = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=values.device)
    scales = torch.empty(len(blocks), dtype=torch.uint8, device=values.device)
    wide = len(matrices)
    tokens, matrices = blocks.view(-1, wide, BLOCK), matrices.float()
    parts = packed.view(-1, wide, BLOCK // 2), scales.view(-1, wide, 1)
    for here in chunks(tokens, len(matrices)):
        codes = mxfp4.quantize(_rotated(tokens[here].float(), matrices), rule)
        for part, found in zip(parts, codes, strict=True):
            part[here] = found
    *rows, width = values.shape
    return MXFP4(packed.view(*rows, width // 2), scales.view(*rows, width // BLOCK))


def _rotated(
    tokens: Float[Tensor, "n wide 32"], matrices: Float[Tensor, "wide 32 32"]
) -> Float[Tensor, "n wide 32"]:
    if len(matrices) == 1:
        return tokens @ matrices[0]
    return torch.bmm(tokens.transpose(0, 1), matrices).transpose(0, 1).contiguous()
