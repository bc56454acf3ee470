"""One MX block as one value: 32 lanes that LLVM lays out over the vector registers of the machine.

numba's own vectorizer does not find the nibbles of `pack`, nor a matrix that should stay in
registers. So kernels speak of whole blocks here: a block is loaded, changed by the functions below
and stored, each of which is a handful of LLVM instructions on <32 x T>. LLVM maps them to whatever
the CPU has (AVX2: four registers a block; AVX-512: two; NEON: eight), so there is one source and no
table of CPUs.

    Bits     32 x int32, the bits of float32 numbers or small integers
    Packed   16 bytes, two E2M1 codes each

Everything is exact integer arithmetic but for the float32 products and sums that a name announces;
those are IEEE operations one by one (`fma` is one rounding by definition).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.numba.compile import kernel

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_ABS, _EXPONENT, _ONE, _SIX, _SIGN = 0x7FFFFFFF, 0x7F800000, 0x3F800000, 0x40C00000, 0x80000000

# Added to the bits of a power p these give 2^22 p and (2^22 + 3) p, and adding one of those to a
# magnitude between p and 2p rounds it as E2M1 does: see `formats.e2m1`.
_ROUND, _ROUND_TO_CODE = 22 << 23, (22 << 23) + 6

_DOUBLED = 0xC8643210
"""2 x each E2M1 magnitude, a hexadecimal digit each: 0, 1, 2, 3, 4, 6, 8, 12."""


class _Bits(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="Bits32")


class _Packed(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="Packed16")


Bits, Packed = _Bits(), _Packed()


@register_model(_Bits)
class _BitsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(_I32, BLOCK))


@register_model(_Packed)
class _PackedModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(_I8, BLOCK // 2))


def _vector(element: ir.Type, lanes: int = BLOCK) -> ir.Type:
    return ir.VectorType(element, lanes)


def _all(element: ir.Type, value: int | float, lanes: int = BLOCK) -> ir.Constant:
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _spread(build: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """A scalar in all lanes."""
    nothing = ir.Constant(_vector(scalar.type), ir.Undefined)
    first = build.insert_element(nothing, scalar, _I32(0))
    return build.shuffle_vector(first, nothing, _all(_I32, 0))


def _call(build: ir.IRBuilder, name: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return build.call(build.module.declare_intrinsic(name, fnty=kind), operands)


def _floats(build: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    return build.bitcast(bits, _vector(_F32))


def _bits(build: ir.IRBuilder, floats: ir.Value) -> ir.Value:
    return build.bitcast(floats, _vector(_I32))


def _row(context: Any, build: ir.IRBuilder, kind: Any, array: ir.Value, row: ir.Value) -> ir.Value:
    """The address of a row of a C-contiguous two-dimensional array."""
    view = context.make_array(kind)(context, build, array)
    width = build.extract_value(view.shape, 1)
    return build.gep(view.data, [build.mul(row, width)])


def _function(signature: Any, emit: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, build: ir.IRBuilder, called: Any, operands: Any) -> ir.Value:
        return emit(context, build, called.args, *operands)

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, row: Any) -> Any:
    """A row of 32 numbers as float32 bits: from float32 or int32, or from the int16 bits of
    bfloat16."""

    def emit(context: Any, build: Any, kinds: Any, array: Any, row: Any) -> ir.Value:
        address = _row(context, build, kinds[0], array, row)
        element = _I16 if kinds[0].dtype.bitwidth == 16 else _I32
        loaded = build.load(build.bitcast(address, _vector(element).as_pointer()))
        loaded.align = element.width // 8
        if element is _I32:
            return loaded
        return build.shl(build.zext(loaded, _vector(_I32)), _all(_I32, 16))

    return _function(Bits(array, types.intp), emit)


def _store(name: str, lasting: bool) -> Any:
    def store(typing: Any, array: Any, row: Any, bits: Any) -> Any:
        def emit(context: Any, build: Any, kinds: Any, array: Any, row: Any, bits: Any) -> Any:
            address = _row(context, build, kinds[0], array, row)
            element = _I32
            if kinds[0].dtype.bitwidth == 16:
                element = _I16
                bits = build.trunc(build.lshr(bits, _all(_I32, 16)), _vector(_I16))
            stored = build.store(bits, build.bitcast(address, _vector(element).as_pointer()))
            stored.align = element.width // 8 if lasting else 32
            if not lasting:
                stored.set_metadata("nontemporal", build.module.add_metadata([_I32(1)]))
            return context.get_dummy_value()

        return _function(types.void(array, types.intp, Bits), emit)

    store.__name__ = name
    return intrinsic(store)


store = _store("store", lasting=True)
"""Write a row of float32 bits; as bfloat16, whose lower half must be zero, to an int16 array."""

stream = _store("stream", lasting=False)
"""`store` past the caches: for results larger than them, in rows that begin at multiples of 32
bytes. It saves reading what is about to be overwritten."""


@intrinsic  # type: ignore[untyped-decorator]
def amax_bits(typing: Any, bits: Any) -> Any:
    """The bits of the largest magnitude: an integer maximum, in which NaN and Inf win."""

    def emit(context: Any, build: Any, kinds: Any, bits: Any) -> ir.Value:
        magnitudes = build.and_(bits, _all(_I32, _ABS))
        return _call(build, f"llvm.vector.reduce.umax.v{BLOCK}i32", _I32, magnitudes)

    return _function(types.int32(Bits), emit)


def _rounded(build: Any, bits: Any, inverse: Any, shift: int) -> tuple[Any, Any]:
    """|x| * inverse, cut at 6, plus a shifted power of two; and that power."""
    highest = f"llvm.{{}}.v{BLOCK}i32"
    magnitude = _floats(build, build.and_(bits, _all(_I32, _ABS)))
    scaled = _bits(build, build.fmul(magnitude, _spread(build, inverse)))
    scaled = _call(build, highest.format("umin"), _vector(_I32), scaled, _all(_I32, _SIX))
    power = build.and_(scaled, _all(_I32, _EXPONENT))
    power = _call(build, highest.format("umax"), _vector(_I32), power, _all(_I32, _ONE))
    added = _floats(build, build.add(power, _all(_I32, shift)))
    return build.fadd(_floats(build, scaled), added), added


@intrinsic  # type: ignore[untyped-decorator]
def nearest(typing: Any, bits: Any, inverse: Any, scale: Any) -> Any:
    """`e2m1.nearest(x * inverse) * scale` as bits, the sign always kept.

    ``scale`` NaN makes all lanes NaN.
    """

    def emit(context: Any, build: Any, kinds: Any, bits: Any, inverse: Any, scale: Any) -> ir.Value:
        shifted, added = _rounded(build, bits, inverse, _ROUND)
        value = _bits(build, build.fsub(shifted, added))
        signed = build.or_(value, build.and_(bits, _all(_I32, _SIGN)))
        return _bits(build, build.fmul(_floats(build, signed), _spread(build, scale)))

    return _function(Bits(Bits, types.float32, types.float32), emit)


@intrinsic  # type: ignore[untyped-decorator]
def encode(typing: Any, bits: Any, inverse: Any) -> Any:
    """`e2m1.pack(e2m1.encode(x * inverse))`."""

    def emit(context: Any, build: Any, kinds: Any, bits: Any, inverse: Any) -> ir.Value:
        shifted = _bits(build, _rounded(build, bits, inverse, _ROUND_TO_CODE)[0])
        code = build.add(build.lshr(shifted, _all(_I32, 22)), shifted)
        code = build.and_(code, _all(_I32, 7))
        sign = build.and_(build.lshr(bits, _all(_I32, 28)), _all(_I32, 8))
        bytes_ = build.trunc(build.or_(code, sign), _vector(_I8))
        pairs = build.bitcast(bytes_, _vector(_I16, BLOCK // 2))
        joined = build.or_(pairs, build.lshr(pairs, _all(_I16, 4, BLOCK // 2)))
        return build.trunc(joined, _vector(_I8, BLOCK // 2))

    return _function(Packed(Bits, types.float32), emit)


@intrinsic  # type: ignore[untyped-decorator]
def load_packed(typing: Any, array: Any, row: Any) -> Any:
    """A row of 16 bytes."""

    def emit(context: Any, build: Any, kinds: Any, array: Any, row: Any) -> ir.Value:
        address = _row(context, build, kinds[0], array, row)
        loaded = build.load(build.bitcast(address, _vector(_I8, BLOCK // 2).as_pointer()))
        loaded.align = 1
        return loaded

    return _function(Packed(array, types.intp), emit)


@intrinsic  # type: ignore[untyped-decorator]
def store_packed(typing: Any, array: Any, row: Any, packed: Any) -> Any:
    """Write a row of 16 bytes."""

    def emit(context: Any, build: Any, kinds: Any, array: Any, row: Any, packed: Any) -> Any:
        address = _row(context, build, kinds[0], array, row)
        pointer = build.bitcast(address, _vector(_I8, BLOCK // 2).as_pointer())
        build.store(packed, pointer).align = 1
        return context.get_dummy_value()

    return _function(types.void(array, types.intp, Packed), emit)


def _nibbles(build: Any, packed: Any) -> ir.Value:
    """32 codes, a byte each."""
    low = build.and_(packed, _all(_I8, 15, BLOCK // 2))
    high = build.lshr(packed, _all(_I8, 4, BLOCK // 2))
    order = [half for j in range(BLOCK // 2) for half in (j, BLOCK // 2 + j)]
    return build.shuffle_vector(low, high, ir.Constant(_vector(_I32), order))


@intrinsic  # type: ignore[untyped-decorator]
def decode(typing: Any, packed: Any, half_scale: Any) -> Any:
    """The elements' values as bits, given *half* of their scale (a power of two, or NaN)."""

    def emit(context: Any, build: Any, kinds: Any, packed: Any, half_scale: Any) -> ir.Value:
        code = build.zext(_nibbles(build, packed), _vector(_I32))
        digit = build.and_(build.shl(code, _all(_I32, 2)), _all(_I32, 28))
        doubled = build.and_(build.lshr(_all(_I32, _DOUBLED), digit), _all(_I32, 15))
        value = _bits(build, build.sitofp(doubled, _vector(_F32)))
        sign = build.and_(build.shl(code, _all(_I32, 28)), _all(_I32, _SIGN))
        signed = _floats(build, build.or_(value, sign))
        return _bits(build, build.fmul(signed, _spread(build, half_scale)))

    return _function(Bits(Packed, types.float32), emit)


@intrinsic  # type: ignore[untyped-decorator]
def stream_decoded(typing: Any, array: Any, row: Any, packed: Any, exponent: Any) -> Any:
    """Write the elements' values times 2^exponent as bfloat16 bits, past the caches.

    For exponents from -125 to 125, where every result is a normal number: sixteen-bit arithmetic
    alone, twice as many lanes a register. A magnitude's bits are (m << 6) + (126 << 7) but for 0
    and 0.5.
    """

    def emit(
        context: Any, build: Any, kinds: Any, array: Any, row: Any, packed: Any, exponent: Any
    ) -> Any:
        code = build.zext(_nibbles(build, packed), _vector(_I16))
        magnitude = build.and_(code, _all(_I16, 7))
        shift = build.shl(build.trunc(exponent, _I16), _I16(7))
        bits = build.add(build.shl(magnitude, _all(_I16, 6)), _spread(build, shift))
        bits = build.add(bits, _all(_I16, 126 << 7))
        half = build.icmp_signed("==", magnitude, _all(_I16, 1))
        bits = build.sub(bits, build.and_(build.sext(half, _vector(_I16)), _all(_I16, 1 << 6)))
        nothing = build.icmp_signed("==", magnitude, _all(_I16, 0))
        bits = build.select(nothing, _all(_I16, 0), bits)
        sign = build.and_(build.shl(code, _all(_I16, 12)), _all(_I16, 1 << 15))
        address = _row(context, build, kinds[0], array, row)
        pointer = build.bitcast(address, _vector(_I16).as_pointer())
        stored = build.store(build.or_(bits, sign), pointer)
        stored.align = 32
        stored.set_metadata("nontemporal", build.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return _function(types.void(array, types.intp, Packed, types.int32), emit)


@intrinsic  # type: ignore[untyped-decorator]
def spread(typing: Any, value: Any) -> Any:
    """A float32 in all lanes."""

    def emit(context: Any, build: Any, kinds: Any, value: Any) -> ir.Value:
        return _bits(build, _spread(build, value))

    return _function(Bits(types.float32), emit)


@intrinsic  # type: ignore[untyped-decorator]
def fma(typing: Any, left: Any, right: Any, total: Any) -> Any:
    """left * right + total in float32, rounded once."""

    def emit(context: Any, build: Any, kinds: Any, left: Any, right: Any, total: Any) -> ir.Value:
        operands = [_floats(build, value) for value in (left, right, total)]
        return _bits(build, _call(build, f"llvm.fma.v{BLOCK}f32", _vector(_F32), *operands))

    return _function(Bits(Bits, Bits, Bits), emit)


@intrinsic  # type: ignore[untyped-decorator]
def lanes_sum(typing: Any, bits: Any) -> Any:
    """The float32 sum of all lanes, halves onto halves."""

    def emit(context: Any, build: Any, kinds: Any, bits: Any) -> ir.Value:
        values, lanes = _floats(build, bits), BLOCK
        while lanes > 1:
            lanes //= 2
            halves = [
                build.shuffle_vector(values, values, ir.Constant(_vector(_I32, lanes), order))
                for order in (list(range(lanes)), list(range(lanes, 2 * lanes)))
            ]
            values = build.fadd(*halves)
        return build.extract_element(values, _I32(0))

    return _function(types.float32(Bits), emit)


@kernel
def scale_byte(amax: Any, add: Any) -> Any:
    """`e8m0.encode_amax` of one block."""
    if amax >= 0x7F800000:
        return np.int32(255)
    return np.int32(min(max(((amax + add) >> 23) - 2, 0), 254))


@kernel
def power(byte: Any) -> Any:
    """`e8m0.decode`: 2^(byte - 127), NaN for 255."""
    if byte == 255:
        return np.float32(np.nan)
    return np.int32(byte << 23 if byte else 1 << 22).view(np.float32)


@kernel
def half_power(byte: Any) -> Any:
    """2^(byte - 128), exact; NaN for 255."""
    return np.float32(power(byte) * np.float32(0.5))


@kernel
def inverse_power(byte: Any) -> Any:
    """`e8m0.decode_inverse`, but 1 for 255: what is multiplied with it is NaN already."""
    return np.float32(1) if byte == 255 else power(254 - byte)
