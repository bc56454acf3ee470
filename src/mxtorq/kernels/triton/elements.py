# mypy: allow-untyped-defs, allow-incomplete-defs
"""Tiles of float32 to MXFP4 and back, inside kernels: what every kernel file shares.

The arithmetic is that of `formats.e8m0` and `formats.e2m1` line by line, on the bits of float32:
one integer formula for every scale rule (its ADD constant is an argument), one exact product by a
power of two, and one addition that rounds as E2M1 does. Every product here is exact, so neither
fused multiply-adds nor the order of operations can change a bit; subnormals must not be flushed,
and no instruction that does is generated (the tests look).

These functions are called from kernels only, on tiles whose last axis is a block of 32.
"""

import triton.language as tl

from mxtorq.formats.spec import E2M1_EMAX, E8M0_MAX, E8M0_NAN
from mxtorq.kernels.triton.compile import kernel

_ABS = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(-0x80000000)
_EXPONENT = tl.constexpr(0x7F800000)
_ONE = tl.constexpr(0x3F800000)
_SIX = tl.constexpr(0x40C00000)
_HALF = tl.constexpr(0x3F000000)
_NAN = tl.constexpr(0x7FC00000)
_SHIFT = tl.constexpr(2.0**22 + 3.0)  # why: see formats.e2m1
_EMAX = tl.constexpr(E2M1_EMAX)
_MAX_BYTE = tl.constexpr(E8M0_MAX)
_NAN_BYTE = tl.constexpr(E8M0_NAN)


@kernel
def float_bits(loaded):
    """The float32 bits of int32 (float32's own), int16 (those of bfloat16) or float16 values."""
    if loaded.dtype == tl.int16:
        bits = loaded.to(tl.int32) << 16
    elif loaded.dtype == tl.float16:
        bits = loaded.to(tl.float32).to(tl.int32, bitcast=True)
    else:
        bits = loaded
    return bits


@kernel
def as_float(bits):
    """int32 bits as the float32 that they are."""
    return bits.to(tl.float32, bitcast=True)


@kernel
def as_bits(values):
    """The bits of float32 values as int32."""
    return values.to(tl.int32, bitcast=True)


@kernel
def bfloat16_bits(bits):
    """float32 bits rounded to nearest even bfloat16, as int16. NaN stays NaN."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & _ABS) > _EXPONENT, _NAN >> 16, rounded).to(tl.int16)


@kernel
def scale_bytes(amax, add):
    """`formats.e8m0.encode_amax`: bytes 0..255 as int32 from the bits of the largest magnitudes."""
    byte = tl.minimum(tl.maximum(((amax + add) >> 23) - _EMAX, 0), _MAX_BYTE)
    return tl.where(amax >= _EXPONENT, _NAN_BYTE, byte)


@kernel
def power(byte):
    """2^(byte - 127) as float32 bits, 2^-127 included; NaN for 255."""
    bits = tl.where(byte == 0, 1 << 22, byte << 23)
    return tl.where(byte == _NAN_BYTE, _NAN, bits)


@kernel
def inverse_power(byte):
    """2^(127 - byte) as float32 bits. For byte 255 some finite number."""
    return power(tl.maximum(_MAX_BYTE - byte, 0))


@kernel
def steps(bits):
    """(k steps above a power of two, that power) as `formats.e2m1` finds them, both float32."""
    magnitude = tl.minimum(bits & _ABS, _SIX)
    base = as_float(tl.maximum(magnitude & _EXPONENT, _ONE))
    return as_float(magnitude) + base * _SHIFT, base


@kernel
def encode(bits):
    """`formats.e2m1.encode` of scaled values: codes 0..15 as int32."""
    shifted, _ = steps(bits)
    low = as_bits(shifted)
    return (((low >> 22) + low) & 7) | ((bits >> 28) & 8)


@kernel
def nearest(bits):
    """`formats.e2m1.nearest` of scaled values, as float32."""
    shifted, base = steps(bits)
    return as_float(as_bits(shifted - base * _SHIFT) | (bits & _SIGN))


@kernel
def decode(codes):
    """The value of codes 0..15 (int32), as float32."""
    magnitude = codes & 7
    wide = (magnitude << 22) + _HALF
    bits = tl.where(magnitude > 1, wide, tl.where(magnitude == 1, _HALF, 0))
    return as_float(bits | ((codes & 8) << 28))


@kernel
def quantize_tile(bits, add):
    """Packed codes [n, 16] and scale bytes [n], both uint8, of float32 bits [n, 32]."""
    byte = scale_bytes(tl.max(bits & _ABS, axis=1), add)
    scaled = as_bits(as_float(bits) * as_float(inverse_power(byte))[:, None])
    pairs = tl.reshape(encode(scaled), (bits.shape[0], 16, 2))
    low, high = tl.split(pairs)
    packed = tl.where((byte == _NAN_BYTE)[:, None], 0, low | (high << 4))
    return packed.to(tl.uint8), byte.to(tl.uint8)


@kernel
def fake_quantize_tile(bits, add):
    """Float32 bits [n, 32] of what `quantize_tile` stands for."""
    byte = scale_bytes(tl.max(bits & _ABS, axis=1), add)
    scaled = as_bits(as_float(bits) * as_float(inverse_power(byte))[:, None])
    rounded = nearest(scaled) * as_float(power(byte))[:, None]
    return tl.where((byte == _NAN_BYTE)[:, None], _NAN, as_bits(rounded))


@kernel
def store_bits(target, bits, mask):
    """Store float32 bits in the dtype of a pointer: int32, or int16 for a bfloat16 that holds them.

    Only for values of few significant bits: bfloat16 is cut, not rounded.
    """
    if target.dtype.element_ty == tl.int16:
        tl.store(target, (bits >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(target, bits, mask=mask)


@kernel
def emit(values, rows, inside, out, scales, add, FAKE: tl.constexpr):
    """Round float32 tiles [n, 32] and store them as the blocks ``rows``: floats, or packed codes
    and scale bytes."""
    bits = as_bits(values)
    if FAKE:
        at = rows[:, None] * 32 + tl.arange(0, 32)[None, :]
        store_bits(out + at, fake_quantize_tile(bits, add), inside[:, None])
    else:
        packed, byte = quantize_tile(bits, add)
        at = rows[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(out + at, packed, mask=inside[:, None])
        tl.store(scales + rows, byte, mask=inside)
