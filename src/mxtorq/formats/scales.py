"""Block scales of any kind: the rules of E8M0, and two that no hardware has.

Published numbers of MXFP4 methods were often made with scales outside of the format. To explain
such numbers they can be evaluated here, always under a name that says so, in a part of their own of
every table; nothing that uses them can be exported.

    log256        DuQuant++'s released code: 256 levels, evenly spaced in log2 between the smallest
                  and the largest amax / 6 of the *whole tensor*. Two more numbers a tensor, and a
                  reduction over all activations of a batch before the first can be rounded.
    four-thirds   MR-GPTQ: 4/3 of the OCP floor scale, so amax/s lies in [3, 6) and nothing is cut.
                  An E8M0 byte and a constant that the matrix unit knows nothing of.

`mxfp4` is the strict format; `kernels.dispatch` has functions that take either kind.
"""

from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from mxtorq.formats import e2m1, e8m0, mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.spec import BLOCK

_LEVELS = 256
_TINY = 2.0**-126


class NonOCPScale(StrEnum):
    """Scales outside of the format: for evaluation only."""

    LOG256 = "log256"
    FOUR_THIRDS = "four-thirds"


Scale = ScaleRule | NonOCPScale
"""How block scales are chosen."""


class ScaledE2M1(NamedTuple):
    """E2M1 codes under scales that are not E8M0: what a non-OCP weight is."""

    packed: UInt8[Tensor, "*rows half"]
    scales: Float32[Tensor, "*rows blocks"]


def is_ocp(scale: Scale) -> bool:
    """Whether hardware has this scale, so that a checkpoint may."""
    return isinstance(scale, ScaleRule)


def block_scales(blocks: Float32[Tensor, "*shape 32"], scale: Scale) -> Float32[Tensor, "*shape"]:
    """The scale of each block as a number. NaN where a block holds NaN or Inf.

    With `NonOCPScale.LOG256` it depends on all blocks that are passed in. Blocks of zeros, NaN or
    Inf take no part in the range, and equal scales are kept as they are: the released code divides
    0 by 0 there. Zeros under it have the smallest scale in use, or 1 if there is nothing else.
    """
    bits = e8m0.magnitude_bits(blocks).amax(-1)
    if isinstance(scale, ScaleRule):
        return e8m0.decode(e8m0.encode_amax(bits, scale))
    if scale is NonOCPScale.FOUR_THIRDS:
        # In float64, because 2^-127 * 4/3 is subnormal in float32 and would be rounded twice.
        return (e8m0.decode(e8m0.encode_amax(bits, ScaleRule.FLOOR)).double() * (4 / 3)).float()
    wanted = (blocks.abs().amax(-1).double() / 6).clamp(min=_TINY).log2()
    finite = torch.isfinite(wanted)
    used = wanted[finite & (bits > 0)]
    if not len(used):
        return torch.ones_like(wanted, dtype=torch.float32).masked_fill(~finite, torch.nan)
    low, high = used.min(), used.max()
    # Divided first: 255 * (high - low) / (high - low) can fall short of 255, and its floor is 254.
    # An empty range makes 0 / 0 of it, and that is step 0 of 0.
    part = ((wanted - low) / (high - low)).nan_to_num(0.0)
    index = ((_LEVELS - 1) * part).floor().clamp(0, _LEVELS - 1)
    level = torch.exp2(low + (high - low) * (index / (_LEVELS - 1))).float()
    return level.masked_fill(~finite, torch.nan)


def fake_quantize(
    values: Float[Tensor, "*rows d"],
    scale: NonOCPScale,
    out: Float[Tensor, "*rows d"] | None = None,
) -> Float[Tensor, "*rows d"]:
    """Values rounded to E2M1 under scales outside of the format, in their own dtype.

    Raises:
        FormatError: as `mxfp4.fake_quantize`: the dtype has to be float32 or bfloat16.
    """
    mxfp4.as_blocks(values, (torch.float32, torch.bfloat16))
    result = mxfp4.check_out(out, values.shape, values.dtype, values.device)
    return result.copy_(dequantize(quantize(values, scale)))


def quantize(values: Float[Tensor, "*rows d"], scale: NonOCPScale) -> ScaledE2M1:
    """Round to nearest under scales outside of the format.

    Raises:
        FormatError: as `mxfp4.quantize`.
    """
    blocks = mxfp4.as_blocks(values).float()
    scales = block_scales(blocks, scale)
    packed = e2m1.pack(e2m1.encode(blocks / scales[:, None]))
    *rows, width = values.shape
    return ScaledE2M1(packed.view(*rows, width // 2), scales.view(*rows, width // BLOCK))


def dequantize(quantized: ScaledE2M1) -> Float32[Tensor, "*rows d"]:
    """The values of such a tensor, in float32."""
    packed, scales = quantized
    rows = packed.reshape(-1, BLOCK // 2)
    values = e2m1.decode_packed(rows, torch.float32) * scales.reshape(-1, 1)
    return values.view(*packed.shape[:-1], packed.shape[-1] * 2)


def assemble(
    codes: UInt8[Tensor, "d_out d"], scales: Float32[Tensor, "d_out blocks"], scale: Scale
) -> MXFP4 | ScaledE2M1:
    """Codes and scale numbers that were chosen elsewhere as a tensor of the kind of ``scale``.

    ``scales`` must be powers of two from 2^-127 to 2^127 for an E8M0 rule, which is what
    `block_scales` gives.
    """
    packed = e2m1.pack(codes)
    if isinstance(scale, ScaleRule):
        return MXFP4(packed, (scales.view(torch.int32) >> 23).to(torch.uint8))
    return ScaledE2M1(packed, scales)
