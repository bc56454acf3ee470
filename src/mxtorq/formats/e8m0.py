"""E8M0 scales: the byte, and the rules that choose it from a block's largest magnitude.

A scale is a power of two, 2^(b - 127) for byte b in 0..254; 255 is NaN (OCP MX v1.0, 5.4.1). The
specification fixes how scales are *read*; which power is *chosen* differs between tools, costs
accuracy, and is a `ScaleRule` here: it travels with every checkpoint and stands in every table.

One integer formula does all rules. With the float32 bits of amax,

    byte = clamp(((bits + ADD) >> 23) - 2, 0, 254)

since ``bits >> 23`` is the biased exponent, and adding ADD carries into it exactly when the
fraction of amax lies above the rule's threshold. There is no logarithm and no division, so it is
exact at every ulp, subnormals included: a float32 ``log2`` is wrong next to powers of two.
NaN and Inf have bits >= 0x7F800000, survive an integer maximum, and give byte 255.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float32, Int32, UInt8
from torch import Tensor

from mxtorq.formats.spec import E2M1_EMAX, E8M0_MAX, E8M0_NAN

_INF_BITS = 0x7F800000
_ABS_MASK = 0x7FFFFFFF


@dataclass(frozen=True, kw_only=True)
class RuleCard:
    """What a scale rule is: its formula, what it costs, who uses it, and its ADD constant."""

    formula: str
    cost: str
    used_by: str
    add: int


class ScaleRule(StrEnum):
    """How a block's scale is chosen from its largest magnitude amax. `card` explains each."""

    FLOOR = "floor"
    EVEN = "even"
    RCEIL = "rceil"
    CEIL = "ceil"
    FLOOR6 = "floor6"
    UOS = "uos"

    @property
    def card(self) -> RuleCard:
        return _CARDS[self]


_CARDS = {
    ScaleRule.FLOOR: RuleCard(
        formula="2^(floor(log2 amax) - 2)",
        cost="amax/s in [4, 8): maxima above 6 are cut to 6, by up to a quarter",
        used_by="OCP MX v1.0 section 6.3; torchao FLOOR, microxcaling, gguf, ml_dtypes recipes",
        add=0,
    ),
    ScaleRule.EVEN: RuleCard(
        formula="2^(floor(log2 round(amax)) - 2), round: to one fraction bit, half to even",
        cost="amax/s in [3.5, 7): maxima above 6 are cut to 6, by up to a seventh",
        used_by="compressed-tensors, llm-compressor, AMD Quark, vLLM's emulation",
        add=0x200000,
    ),
    ScaleRule.RCEIL: RuleCard(
        formula="2^ceil(log2(amax / 6))",
        cost="amax/s in (3, 6]: nothing is cut; just above 3 half of the range stays idle",
        used_by="NVIDIA Blackwell conversion (FlashInfer in vLLM), torchao RCEIL, modelopt",
        add=0x3FFFFF,
    ),
    ScaleRule.CEIL: RuleCard(
        formula="2^(ceil(log2 amax) - 2)",
        cost="amax/s in (2, 4]: the codes 6 and -6 are never used",
        used_by="torchao CEIL",
        add=0x7FFFFF,
    ),
    ScaleRule.FLOOR6: RuleCard(
        formula="2^floor(log2(amax / 6))",
        cost="amax/s in [6, 12): every block maximum is cut to 6, by up to a half",
        used_by="the S-step of TORQ's search; triton_kernels ROUND_DOWN. Not an OCP rule",
        add=-0x400000,
    ),
    ScaleRule.UOS: RuleCard(
        formula="2^ceil(log2(amax / 7.25))",
        cost="amax/s in (3.625, 7.25]: maxima above 6 are cut to 6, by up to 17 %",
        used_by="MXAttention (arXiv 2607.24377), auto-round rceil_v2",
        add=0x17FFFF,
    ),
}


def magnitude_bits(values: Float32[Tensor, "*shape"]) -> Int32[Tensor, "*shape"]:
    """The bits of |values|: integers that order like the magnitudes, with Inf and NaN on top."""
    return values.view(torch.int32) & _ABS_MASK


def encode_amax(amax_bits: Int32[Tensor, "*blocks"], rule: ScaleRule) -> UInt8[Tensor, "*blocks"]:
    """The scale byte of each block from the float32 bits of its largest magnitude.

    Exact for every float32. Zero gives byte 0, NaN and Inf give 255.
    """
    exponent = ((amax_bits + rule.card.add) >> 23) - E2M1_EMAX
    byte = exponent.clamp(0, E8M0_MAX).masked_fill(amax_bits >= _INF_BITS, E8M0_NAN)
    return byte.to(torch.uint8)


def decode(e8m0: UInt8[Tensor, "*blocks"]) -> Float32[Tensor, "*blocks"]:
    """2^(byte - 127), exact (byte 0 is the float32 subnormal 2^-127); NaN for byte 255."""
    bits = e8m0.to(torch.int32) << 23
    bits = bits.masked_fill(e8m0 == 0, 1 << 22).masked_fill(e8m0 == E8M0_NAN, 0x7FC00000)
    return bits.view(torch.float32)


def decode_inverse(e8m0: UInt8[Tensor, "*blocks"]) -> Float32[Tensor, "*blocks"]:
    """2^(127 - byte), exact (byte 254 gives the subnormal 2^-127); NaN for byte 255."""
    return decode((E8M0_MAX - e8m0.to(torch.int32)).clamp(min=0).to(torch.uint8)).masked_fill(
        e8m0 == E8M0_NAN, float("nan")
    )
