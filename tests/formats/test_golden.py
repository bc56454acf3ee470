"""The golden vectors, replayed: through `quantize`, through the reference, and against literals.

The file could drift with the code that makes it, so the answers stand here a third time, by hand:
(rule, byte, the first codes) of every case; all further codes are 0.
"""

import importlib.util
import json
import struct
from pathlib import Path

import pytest
import torch

from mxtorq.formats import e2m1, reference
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, dequantize, fake_quantize, quantize

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "mxfp4.json"
TOOL = ROOT / "tools" / "make_golden.py"

ANSWERS = {
    "floor_amax_one_ulp_below_8": ("floor", 127, [7]),
    "floor_amax_bfloat16_below_8": ("floor", 127, [7]),
    "rceil_amax_6": ("rceil", 127, [7]),
    "rceil_amax_one_ulp_above_6": ("rceil", 128, [5]),
    "even_amax_7": ("even", 128, [6]),
    "even_amax_one_ulp_below_7": ("even", 127, [7]),
    # the values 0 1 1 2 2 4 4 and their negatives
    "ties_go_to_the_even_code": (
        "floor",
        127,
        [0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14],
    ),
    "floor6_amax_4": ("floor6", 126, [7]),
    "positive_zero": ("floor", 127, [6, 0]),
    "negative_zero_and_small_negative": ("floor", 127, [6, 8, 8]),
    "zero_block_floor": ("floor", 0, []),
    "zero_block_rceil": ("rceil", 0, []),
    "floor_amax_smallest_normal": ("floor", 0, [4]),
    "rceil_amax_smallest_normal": ("rceil", 0, [4]),
    "floor_byte_0_without_clamping": ("floor", 0, [6, 4, 10]),
    "floor_amax_smallest_subnormal": ("floor", 0, [0]),
    "rceil_amax_smallest_subnormal": ("rceil", 0, [0]),
    "even_amax_7_times_2_to_125": ("even", 253, [6]),
    "one_nan": ("floor", 255, []),
    "one_inf": ("floor", 255, []),
    "nibble_order": ("floor", 127, [*range(16), *range(15, -1, -1)]),
}
NIBBLE_ORDER = "1032547698badcfeefcdab8967452301"

CASES = json.loads(GOLDEN.read_text())["cases"]
NAMES = [case["name"] for case in CASES]
each_case = pytest.mark.parametrize("case", CASES, ids=NAMES)


def as_float32(case):
    return torch.tensor([int(b, 16) for b in case["input_bits"]]).to(torch.int32)


def test_the_file_is_what_the_tool_makes():
    """Byte for byte; run the tool and look at the difference if this fails."""
    specification = importlib.util.spec_from_file_location("make_golden", TOOL)
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    assert tool.render().encode() == GOLDEN.read_bytes()
    assert tool.OUTPUT.resolve() == GOLDEN.resolve()


def test_the_cases_are_the_ones_answered_here():
    assert list(ANSWERS) == NAMES


@each_case
def test_a_case_is_complete(case):
    assert list(case) == ["name", "rule", "input_bits", "e8m0", "codes", "packed", "why"]
    assert len(case["input_bits"]) == len(case["codes"]) == 32
    assert all(len(b) == 8 and b == b.lower() for b in case["input_bits"])
    assert len(bytes.fromhex(case["packed"])) == 16
    assert case["why"].endswith(".")
    assert "\n" not in case["why"]


@each_case
def test_literals(case):
    rule, byte, codes = ANSWERS[case["name"]]
    assert case["rule"] == rule
    assert case["e8m0"] == byte
    assert case["codes"] == codes + [0] * (32 - len(codes))


def test_nibble_order_literal():
    assert CASES[NAMES.index("nibble_order")]["packed"] == NIBBLE_ORDER


@each_case
def test_reference(case):
    values = [struct.unpack(">f", bytes.fromhex(b))[0] for b in case["input_bits"]]
    assert reference.quantize_block(values, ScaleRule(case["rule"])) == (
        case["e8m0"],
        case["codes"],
    )


@each_case
def test_quantize(case):
    values = as_float32(case).view(torch.float32)
    quantized = quantize(values, ScaleRule(case["rule"]))
    assert quantized.e8m0.tolist() == [case["e8m0"]]
    assert e2m1.unpack(quantized.packed).tolist() == case["codes"]
    assert bytes(quantized.packed.tolist()).hex() == case["packed"]


NARROW = [case for case in CASES if all(b.endswith("0000") for b in case["input_bits"])]


@pytest.mark.parametrize("case", NARROW, ids=[case["name"] for case in NARROW])
def test_quantize_bfloat16(case):
    """The same answer from bfloat16, for the cases that it can hold."""
    # From the bits: a cast may change what a NaN looks like.
    values = (as_float32(case) >> 16).to(torch.int16).view(torch.bfloat16)
    quantized = quantize(values, ScaleRule(case["rule"]))
    assert quantized.e8m0.tolist() == [case["e8m0"]]
    assert bytes(quantized.packed.tolist()).hex() == case["packed"]


def test_most_cases_are_bfloat16_too():
    """All but the last-ulp cases, the float32 subnormals and -0.01."""
    assert {case["name"] for case in CASES} - {case["name"] for case in NARROW} == {
        "floor_amax_one_ulp_below_8",
        "rceil_amax_one_ulp_above_6",
        "even_amax_one_ulp_below_7",
        "negative_zero_and_small_negative",
        "floor_amax_smallest_subnormal",
        "rceil_amax_smallest_subnormal",
    }


@each_case
def test_read_back(case):
    """What a checkpoint reader makes of the stored bytes, and `fake_quantize` of the input."""
    stored = MXFP4(
        torch.tensor(list(bytes.fromhex(case["packed"])), dtype=torch.uint8),
        torch.tensor([case["e8m0"]], dtype=torch.uint8),
    )
    exact = [reference.element_value(code, case["e8m0"]) for code in case["codes"]]
    expected = torch.tensor([float("nan") if v is None else float(v) for v in exact])
    read = dequantize(stored)
    torch.testing.assert_close(read, expected, rtol=0, atol=0, equal_nan=True)
    fake = fake_quantize(as_float32(case).view(torch.float32), ScaleRule(case["rule"]))
    torch.testing.assert_close(fake, read, rtol=0, atol=0, equal_nan=True)
