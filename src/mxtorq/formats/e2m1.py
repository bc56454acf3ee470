"""E2M1 elements: eight magnitudes and a sign in four bits, and two of them in a byte.

    code      s e e m          magnitudes of codes 0..7:  0  .5  1  1.5  2  3  4  6

    packed    byte i =  | element 2i+1 | element 2i |
                          high nibble    low nibble      (0.5, -6.0) -> codes 1, 15 -> 0xF1

Encoding rounds to the nearest magnitude, a tie goes to the even code, what lies beyond 6 becomes
6, and the sign bit is always kept, so -0.0 and -0.01 become code 8 (OCP MX v1.0, 5.3.3; the nibble
order is the one of compressed-tensors, torchao and OCP-aligned engines; GGUF differs).
"""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from mxtorq.formats.spec import E2M1_CUTS, E2M1_MAGNITUDES, E2M1_SIGN

# bucketize counts the cuts that lie strictly below a value. A tie must go up exactly where the
# upper code is even (cuts 1, 3, 5), so those three cuts sit one ulp lower.
_CUTS = torch.tensor(E2M1_CUTS, dtype=torch.float32)
_CUTS[1::2] = torch.nextafter(_CUTS[1::2], torch.tensor(0.0))
_VALUES = torch.tensor([*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)], dtype=torch.float32)


def encode(values: Float32[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The code of the nearest element, ties to even, saturating. NaN has none: it gives 7 or 15."""
    magnitude = torch.bucketize(values.abs(), _CUTS.to(values.device), out_int32=True)
    sign = torch.signbit(values).to(torch.int32) * E2M1_SIGN
    return (magnitude | sign).to(torch.uint8)


def decode(codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The value of each code 0..15, exact."""
    return _VALUES.to(codes.device)[codes.int()]


def pack(codes: UInt8[Tensor, "*rows n"]) -> UInt8[Tensor, "*rows half"]:
    """Two codes a byte, the even element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: UInt8[Tensor, "*rows half"]) -> UInt8[Tensor, "*rows n"]:
    """The inverse of `pack`."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
