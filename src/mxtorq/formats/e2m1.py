"""E2M1 elements: eight magnitudes and a sign in four bits, and two of them in a byte.

    code      s e e m          magnitudes of codes 0..7:  0  .5  1  1.5  2  3  4  6

    packed    byte i =  | element 2i+1 | element 2i |
                          high nibble    low nibble      (0.5, -6.0) -> codes 1, 15 -> 0xF1

Encoding rounds to the nearest magnitude, a tie goes to the even code, what lies beyond 6 becomes
6, and the sign bit is always kept, so -0.0 and -0.01 become code 8 (OCP MX v1.0, 5.3.3; the nibble
order is the one of compressed-tensors, torchao and OCP-aligned engines; GGUF differs).
"""

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from mxtorq.formats.spec import E2M1_MAGNITUDES, E2M1_SIGN

_VALUES = torch.tensor([*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)], dtype=torch.float32)
_PAIRS = torch.stack((_VALUES.repeat(16), _VALUES.repeat_interleave(16)), dim=-1)
_PAIR_DTYPES = {torch.float32: torch.int64, torch.bfloat16: torch.int32}

# Float32 bit patterns. Magnitudes order like the integers behind them, with Inf and NaN on top.
_ABS, _EXPONENT, _ONE, _SIX = 0x7FFFFFFF, 0x7F800000, 0x3F800000, 0x40C00000

# Between 2^22 p and 2^23 p float32 numbers are p/2 apart, which is the distance of E2M1 neighbours
# from p to 2p (and below 1, with p = 1). So adding 2^22 p rounds as E2M1 does, ties to even
# included, and leaves the steps k = 2 |v| / p in the low bits. The code is k + 2 log2 p. The 3 p on
# top (six steps: an even number, so ties stay even) make the exponent's part of
# (bits >> 22) + bits vanish modulo 8.
_SHIFT = 2.0**22 + 3.0


def encode(values: Float32[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The code of the nearest element, ties to even, saturating. NaN has none: it gives 7 or 15."""
    shifted, _ = _shifted(values)
    bits = shifted.view(torch.int32)
    magnitude = (bits >> 22).add_(bits).to(torch.uint8).bitwise_and_(7)
    sign = (values.view(torch.int32) >> 28).to(torch.uint8).bitwise_and_(E2M1_SIGN)
    return magnitude.bitwise_or_(sign)


def decode(codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The value of each code 0..15, exact."""
    return _VALUES.to(codes.device).index_select(0, codes.int().flatten()).view(codes.shape)


def nearest(values: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """`decode(encode(values))` without the codes; NaN gives 6 or -6."""
    shifted, power = _shifted(values)
    return shifted.sub_(power, alpha=_SHIFT).copysign_(values)


def _shifted(
    values: Float32[Tensor, "*shape"],
) -> tuple[Float32[Tensor, "*shape"], Float32[Tensor, "*shape"]]:
    magnitude = (values.view(torch.int32) & _ABS).clamp_(max=_SIX)
    power = (magnitude & _EXPONENT).clamp_(min=_ONE).view(torch.float32)
    return magnitude.view(torch.float32).add_(power, alpha=_SHIFT), power


def decode_packed(
    packed: UInt8[Tensor, "*rows half"], dtype: torch.dtype
) -> Float[Tensor, "*rows n"]:
    """`decode(unpack(packed))` in float32 or bfloat16: one look-up for a pair of elements."""
    pairs = _PAIRS.to(packed.device, dtype).view(_PAIR_DTYPES[dtype]).flatten()
    values = pairs.index_select(0, packed.int().flatten()).view(dtype)
    return values.view(*packed.shape[:-1], packed.shape[-1] * 2)


def pack(codes: UInt8[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows half"]:
    """Two codes a byte, the even element in the low nibble."""
    return torch.add(codes[..., 0::2], codes[..., 1::2], alpha=16)


def unpack(packed: UInt8[Tensor, "*rows half"]) -> UInt8[Tensor, "*rows n"]:
    """The inverse of `pack`."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
