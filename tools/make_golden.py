"""Make tests/golden/mxfp4.json: blocks on which well-known MXFP4 implementations disagree.

    python tools/make_golden.py

Every expected value is computed by ``mxtorq.formats.reference``, in exact arithmetic; this file
only chooses the inputs and says why each is worth keeping. The output is a function of this file
and the reference, byte for byte, and the tests hold it to that. Regenerate it when a case is
added; a changed byte of an existing case is a changed format, not a refresh.

Who differs was observed with torchao 0.18.0, compressed-tensors 0.20.0, nvidia-modelopt 0.47.0,
auto-round 0.16.1, gguf 0.19.0, amd-quark 0.13 (and the triton_kernels code it carries) and
microxcaling at commit 7bc4195.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from mxtorq.formats import reference
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK, E2M1_MAGNITUDES

OUTPUT = Path(__file__).parents[1] / "tests" / "golden" / "mxfp4.json"

NAN, INF = 0x7FC00000, 0x7F800000
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
ALL_CODES = (*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES))


@dataclass(frozen=True)
class Case:
    """One block by its first elements, as float32 bits; the rest are +0."""

    name: str
    rule: ScaleRule
    head: tuple[int, ...]
    why: str

    def record(self) -> dict[str, object]:
        """The case as it stands in the file, with the reference's answers."""
        bits = [*self.head, *[0] * (BLOCK - len(self.head))]
        byte, codes = reference.quantize_block([_value(b) for b in bits], self.rule)
        low_first = bytes(
            low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)
        )
        return {
            "name": self.name,
            "rule": self.rule.value,
            "input_bits": [f"{b:08x}" for b in bits],
            "e8m0": byte,
            "codes": codes,
            "packed": low_first.hex(),
            "why": self.why,
        }


def _bits(*values: float) -> tuple[int, ...]:
    return struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))


def _value(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


CASES = (
    Case(
        "floor_amax_one_ulp_below_8",
        ScaleRule.FLOOR,
        (0x40FFFFFF,),
        "A float32 log2 rounds up next to a power of two: gguf, auto-round quant_mx, microxcaling "
        "and quark's floor give byte 128.",
    ),
    Case(
        "floor_amax_bfloat16_below_8",
        ScaleRule.FLOOR,
        (0x40FF0000,),
        "For bfloat16 input microxcaling and quark's floor take log2 in bfloat16 and give byte "
        "128 here, far from the last ulp.",
    ),
    Case(
        "rceil_amax_6",
        ScaleRule.RCEIL,
        (0x40C00000,),
        "The largest maximum that the scale 1 holds without cutting; its partner is one ulp above.",
    ),
    Case(
        "rceil_amax_one_ulp_above_6",
        ScaleRule.RCEIL,
        (0x40C00001,),
        "The float32 quotient amax/6 rounds to 1: torchao RCEIL, modelopt and auto-round rceil "
        "give byte 127 and cut the maximum.",
    ),
    Case(
        "even_amax_7",
        ScaleRule.EVEN,
        (0x40E00000,),
        "The threshold of EVEN itself: compressed-tensors, quark and triton_kernels agree that 7 "
        "goes up.",
    ),
    Case(
        "even_amax_one_ulp_below_7",
        ScaleRule.EVEN,
        (0x40DFFFFF,),
        "One ulp below the threshold of EVEN: compressed-tensors, quark and triton_kernels agree "
        "that it stays down.",
    ),
    Case(
        "ties_go_to_the_even_code",
        ScaleRule.FLOOR,
        _bits(*TIES, *(-t for t in TIES)),
        "All seven ties and their negatives at scale 1: modelopt and gguf round them toward zero, "
        "triton_kernels and microxcaling's default away from zero.",
    ),
    Case(
        "floor6_amax_4",
        ScaleRule.FLOOR6,
        _bits(4.0),
        "triton_kernels' ROUND_DOWN is this rule and not the OCP floor (byte 127): it cuts every "
        "block maximum.",
    ),
    Case(
        "positive_zero",
        ScaleRule.FLOOR,
        _bits(4.0, 0.0),
        "modelopt gives +0 the code 8, a minus zero.",
    ),
    Case(
        "negative_zero_and_small_negative",
        ScaleRule.FLOOR,
        _bits(4.0, -0.0, -0.01),
        "compressed-tensors, gguf, microxcaling, auto-round and quark give -0 the code 0, and "
        "gguf gives -0.01 the code 0 too.",
    ),
    Case(
        "zero_block_floor",
        ScaleRule.FLOOR,
        (),
        "auto-round stores byte 126 for an all-zero block under its floor rule.",
    ),
    Case(
        "zero_block_rceil",
        ScaleRule.RCEIL,
        (),
        "auto-round stores byte 128 for an all-zero block under its rceil rule.",
    ),
    Case(
        "floor_amax_smallest_normal",
        ScaleRule.FLOOR,
        (0x00800000,),
        "Byte 0 means 2^-127: torchao encodes with 2^-126 and halves the value, triton_kernels "
        "stores byte 1, gguf wraps to byte 255.",
    ),
    Case(
        "rceil_amax_smallest_normal",
        ScaleRule.RCEIL,
        (0x00800000,),
        "torchao RCEIL gives every element of a block with byte 0 the code 0.",
    ),
    Case(
        "floor_byte_0_without_clamping",
        ScaleRule.FLOOR,
        (0x01000000, 0x00800000, 0x80400000),
        "Byte 0 reached by the rule itself, with a subnormal element: torchao FLOOR encodes such "
        "blocks with 2^-126 but stores 0.",
    ),
    Case(
        "floor_amax_smallest_subnormal",
        ScaleRule.FLOOR,
        (0x00000001,),
        "gguf wraps to byte 232 and triton_kernels stores byte 1.",
    ),
    Case(
        "rceil_amax_smallest_subnormal",
        ScaleRule.RCEIL,
        (0x00000001,),
        "auto-round rceil gives NaN.",
    ),
    Case(
        "even_amax_7_times_2_to_125",
        ScaleRule.EVEN,
        (0x7F600000,),
        "compressed-tensors gives NaN, quark and triton_kernels EVEN give byte 254; the exact "
        "code stands for 2^128, which float32 reads as Inf everywhere.",
    ),
    Case(
        "one_nan",
        ScaleRule.FLOOR,
        (*_bits(1.0, -2.0), NAN, *_bits(4.0)),
        "modelopt, gguf and triton_kernels' ROUND_UP and ROUND_DOWN silently give zeros and "
        "compressed-tensors an undefined byte; others agree on NaN but not on the codes.",
    ),
    Case(
        "one_inf",
        ScaleRule.FLOOR,
        (*_bits(1.0, -2.0), INF, *_bits(4.0)),
        "torchao gives byte 253 or 254 and keeps the Inf alone, modelopt and gguf give zeros, "
        "auto-round, microxcaling and compressed-tensors a NaN block.",
    ),
    Case(
        "nibble_order",
        ScaleRule.FLOOR,
        _bits(*ALL_CODES, *reversed(ALL_CODES)),
        "Every code in both nibbles: torchao, modelopt and compressed-tensors put the even "
        "element into the low nibble, gguf pairs elements j and j+16.",
    ),
)


def render() -> str:
    """The whole file: one field a line, so that a changed byte is one changed line."""
    certificate = {
        "format": "MXFP4: 32 E2M1 codes and one E8M0 byte a block, OCP MX v1.0",
        "made_by": "tools/make_golden.py",
        "computed_by": "mxtorq.formats.reference (exact fractions)",
        "input_bits": "float32, hexadecimal",
        "packed": "hexadecimal, byte i = code 2i in the low nibble, code 2i+1 in the high one",
    }
    head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in certificate.items())
    cases = ",\n".join(
        "  {\n"
        + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in case.record().items())
        + "\n  }"
        for case in CASES
    )
    return f'{{\n{head},\n "cases": [\n{cases}\n ]\n}}\n'


def main() -> None:
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_bytes(render().encode())
    print(f"{len(CASES)} cases in {OUTPUT}")


if __name__ == "__main__":
    main()
