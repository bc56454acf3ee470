"""The page of numerics says what the code computes: its tables are computed again."""

import re
from fractions import Fraction
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from mxtorq.export.targets import Target
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.reference import element_code, element_value, quantize_block, scale_byte
from mxtorq.formats.spec import E2M1_CUTS, E2M1_MAGNITUDES

PAGE = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]


def marked(name: str) -> list[list[str]]:
    """The table between ``<!-- name -->`` and ``<!-- end -->``, its second line left out."""
    part = PAGE.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
    head, _, *rows = [cells(line) for line in part.strip().splitlines()]
    return [head, *rows]


def row_of(name: str) -> list[str]:
    """The row of a table without marks that starts with a word."""
    (line,) = re.findall(rf"^\| {name} \|.*\|$", PAGE, re.MULTILINE)
    return cells(line)[1:]


def code_bits(amax: float) -> int:
    """What a plain cast to E8M0 makes of amax / 4, by another library."""
    scale = np.array([amax / 4], np.float32).astype(ml_dtypes.float8_e8m0fnu)
    return int(scale.view(np.uint8)[0])


def test_the_disagreement_table() -> None:
    head, *rows = marked("disagreement")
    rules = [ScaleRule(name) for name in head[1:-1]]
    assert set(rules) == set(ScaleRule)
    assert len(rows) >= 5
    for row in rows:
        amax = float(row[0])
        for rule, told in zip(rules, row[1:-1], strict=True):
            byte = scale_byte(amax, rule)
            value = element_value(element_code(amax, byte), byte)
            assert value is not None
            assert told == f"{byte} → {float(value):g}", (amax, rule)
        assert row[-1] == str(code_bits(amax))
    assert any(len(set(row[1:-1])) > 2 for row in rows)


def test_elements_and_ties() -> None:
    assert [float(cell) for cell in row_of("value")] == list(E2M1_MAGNITUDES)
    assert row_of("bits `s e e m`") == [f"{code:04b}" for code in range(8)]
    assert [float(cell) for cell in row_of("middle")] == list(E2M1_CUTS)
    told = [float(cell) for cell in row_of("becomes")]
    assert told == [E2M1_MAGNITUDES[element_code(cut, 127)] for cut in E2M1_CUTS]


@pytest.mark.parametrize("rule", ScaleRule)
def test_every_rule_stands_there(rule: ScaleRule) -> None:
    """With the interval of amax over the scale, and the constant of the integer formula."""
    name = f"`{rule.value}`" + (r" \(default\)" if rule is ScaleRule.FLOOR else "")
    (line,) = re.findall(rf"^\| {name} \| \$2.*\|$", PAGE, re.MULTILINE)
    low, high = re.findall(r"[\[(](\d[\d.]*), (\d[\d.]*)[\])]", line)[0]
    over = [
        Fraction(a) / Fraction(2) ** (scale_byte(a, rule) - 127) for a in np.arange(1, 16, 1 / 64)
    ]
    assert min(over) == Fraction(low) or Fraction(0) < min(over) - Fraction(low) <= Fraction(1, 16)
    assert max(over) == Fraction(high) or Fraction(0) < Fraction(high) - max(over) <= Fraction(1, 8)
    add = f"{'−' if rule.card.add < 0 else ''}0x{abs(rule.card.add):X}" if rule.card.add else "0"
    told = PAGE.split("where ADD is ")[1].split("It is exact")[0].replace("\n", " ")
    assert re.search(rf"{add} for `{rule.value}`", told), add


def test_the_targets() -> None:
    _, *rows = marked("targets")
    told = dict(rows)
    own = {t.value: t.card.activations.value for t in Target if t.card.activations is not None}
    assert told == {**own, "mxtorq": "that of the checkpoint"}


def by_gguf(values: list[float]) -> tuple[int, list[int]]:
    """Scale byte and codes of a block by the gguf package."""
    block = np.zeros(32, np.float32)
    block[: len(values)] = values
    with np.errstate(all="ignore"):
        made = gguf.quants.quantize(block, gguf.GGMLQuantizationType.MXFP4)
    codes = [int(made[1 + j % 16]) >> (4 if j >= 16 else 0) & 15 for j in range(len(values))]
    return int(made[0]), codes


def ours(values: list[float]) -> tuple[int, list[int]]:
    byte, codes = quantize_block([*values, *[0.0] * (32 - len(values))], ScaleRule.FLOOR)
    return byte, codes[: len(values)]


def test_what_gguf_does_differently() -> None:
    """The claims about the gguf package, and that the two agree where nothing is claimed."""
    below_8 = float(np.nextafter(np.float32(8), np.float32(0)))
    assert (ours([below_8])[0], by_gguf([below_8])[0]) == (127, 128)
    ties = [4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5]
    assert ours(ties) == (127, [6, 0, 2, 2, 4, 4, 6])
    assert by_gguf(ties) == (127, [6, 0, 1, 2, 3, 4, 5])
    assert (ours([4.0, -0.0, -0.01])[1], by_gguf([4.0, -0.0, -0.01])[1]) == ([6, 8, 8], [6, 0, 0])
    assert (ours([2.0**-126])[0], by_gguf([2.0**-126])[0]) == (0, 255)
    assert (ours([float("nan"), 1.0])[0], by_gguf([float("nan"), 1.0])) == (255, (0, [0, 0]))
    assert ours([5.3, -2.2, 0.9]) == by_gguf([5.3, -2.2, 0.9])


def test_special_values_of_the_page() -> None:
    assert quantize_block([0.0] * 31 + [-0.0], ScaleRule.FLOOR) == (0, [0] * 31 + [8])
    assert quantize_block([float("inf")] + [1.0] * 31, ScaleRule.FLOOR) == (255, [0] * 32)
    largest = float(np.finfo(np.float32).max)
    assert {scale_byte(largest, rule) for rule in ScaleRule} == {252, 253}
    assert ours([2.0**-126]) == (0, [4])
    assert scale_byte(1.75 * 2.0**127, ScaleRule.EVEN) == 253
    above_6 = float(np.nextafter(np.float32(6), np.float32(7)))
    assert scale_byte(above_6, ScaleRule.RCEIL) == 128
