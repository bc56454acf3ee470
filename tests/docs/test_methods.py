"""Every method has its page, with the figures of docs/results and the price of its transform."""

import ast
import operator
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import oracles
from mxtorq.config import parse_method
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import fake_quantize
from mxtorq.rounding import ROUNDINGS
from mxtorq.transforms import METHODS
from mxtorq.transforms.base import Judgement, SiteStatistics
from mxtorq.transforms.chain import Chain, chain
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.hadamard import sizes
from mxtorq.transforms.mxtorq.method import MXTORQ

FOLDER = Path(__file__).parents[2] / "docs" / "methods"
RESULTS = (FOLDER.parent / "results" / "README.md").read_text(encoding="utf-8")
OVERVIEW = (FOLDER / "README.md").read_text(encoding="utf-8")
NAMES = {"brq": "brq:size=16", "duquant": "duquant:block=32"}
"""Spellings on babyllama, where other block sizes do not divide the widths."""


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def without_page(names: list[str]) -> list[str]:
    return [name for name in names if not (FOLDER / f"{name}.md").is_file()]


def table(heading: str) -> dict[str, list[str]]:
    """Rows of the first table with GPTQ columns below a heading of docs/results, by method."""
    rows = RESULTS.split(heading)[1].split("| method |")[1].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0].strip("`"): row[1:] for row in cells[: [len(r) for r in cells].index(1)]}


def figures(method: str) -> str:
    """The table that a page shows, made from docs/results."""
    small = table("## Every method on a real trained model")
    reference = table("## The reference model")
    lines = [
        "| GPTQ, rule `floor` | babyllama | with outliers | reference | with outliers |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(["identity", "hadamard", method]):
        there = NAMES.get(name, name)
        spoken = f"`{name}`" if there == name else f"`{name}` (babyllama: `{there}`)"
        shown = [small[there][1], small[there][3], reference[name][1], reference[name][3]]
        lines.append(f"| {spoken} | {' | '.join(shown)} |")
    return "\n".join(lines)


def test_every_method_has_a_page() -> None:
    """Named as the method is, and reached from the overview; roundings have one together."""
    assert without_page(list(METHODS)) == []
    assert all(f"({name}.md)" in OVERVIEW for name in METHODS)
    together = (FOLDER / "roundings.md").read_text(encoding="utf-8")
    assert all(f"--rounding {name}" in together for name in ROUNDINGS)
    assert without_page(["no-such-method"])


@pytest.mark.parametrize("name", METHODS)
def test_a_page_answers_every_question(name: str) -> None:
    """Idea, price, how to use it, what was measured, when it wins; and every option."""
    page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    for heading in ("Idea", "Price", "Use it", "Measured", "When "):
        assert re.search(rf"^## {heading}", page, re.MULTILINE), heading
    assert re.search(rf"--method {re.escape(name)}[ :]", page)
    options = [field.name for field in fields(METHODS[name])]
    assert [option for option in options if f"`{option}`" not in page] == []


@pytest.mark.parametrize("name", [name for name in METHODS if f"| `{name}` |" in RESULTS])
def test_figures_are_those_of_the_results(name: str) -> None:
    page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    shown = page.split(f"<!-- figures {name} -->")[1].split("<!-- end -->")[0]
    assert shown.strip().startswith(figures(name))


def prices() -> dict[str, tuple[str, str]]:
    rows = OVERVIEW.split("<!-- prices -->")[1].split("<!-- end -->")[0].strip().splitlines()[2:]
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: (row[1], row[2]) for row in cells}


def worth(formula: str, known: dict[str, int]) -> int:
    """The number that a formula of the overview comes to."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return int(OPERATIONS[type(node.op)](value(node.left), value(node.right)))
        return known[node.id] if isinstance(node, ast.Name) else int(ast.literal_eval(node))

    plain = formula.replace("Σn²", "squares").replace("Σn", "factors")
    return value(ast.parse(re.sub(r"(\d+)²", r"\1 * \1", plain), mode="eval").body)


def site(width: int) -> SiteStatistics:
    """A site with what a method is judged by that chooses: plain outputs, rounding to nearest."""
    fitted = oracles.statistics(width)
    rows = torch.cat(fitted.weights)
    judgement = Judgement(
        held_out=oracles.activations(100, width, outliers=4, seed=11),
        gradients=rows,
        held_out_gradients=rows,
        output_weights=torch.ones(len(rows), dtype=torch.float64),
        activations=ScaleRule.FLOOR,
        corrected=False,
        rounded=lambda weight, moment: fake_quantize(weight, ScaleRule.FLOOR),
        runs=lambda transform: True,
        stock=lambda transform: False,
    )
    return replace(fitted, judgement=judgement)


@pytest.mark.parametrize("name", [*METHODS, *(f"mxtorq:budget={most}" for most in (0, 32, 64))])
def test_prices_are_those_of_the_transforms(name: str) -> None:
    """The formulas of the overview, for the input of down_proj; a bound where it says "at most"."""
    width, blocks = 384, 12
    method = parse_method(name)
    transform = method.fit(site(width), seed=3)
    if isinstance(transform, Chain) and isinstance(transform.links[0], Diagonal):
        transform = chain(*transform.links[1:])  # factors are merged into what comes before
    stored = sum(tensor.numel() * tensor.element_size() for tensor in transform.tensors().values())
    factors = sizes(width)
    squares = sum(factor**2 for factor in factors)
    known = {"d": width, "B": blocks, "factors": sum(factors), "squares": squares}
    if isinstance(method, MXTORQ):
        known["budget"] = method.budget
    for formula, real in zip(
        prices()[name.split(":")[0]], (transform.multiply_adds, stored), strict=True
    ):
        most = formula.startswith("at most ")
        told = worth(formula.removeprefix("at most "), known)
        assert told >= real if most else told == real, (formula, told, real)
