"""Records of inspections go to JSON and back, contradictions are refused, tables fit."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from inspections import INSPECTION, picture, site
from mxtorq.errors import UsageError
from mxtorq.reports.blocks import Bars, Charts, Fold, Grid, Heat
from mxtorq.reports.imbalance import bars, markdown, sheets, terminal
from mxtorq.reports.inspection import Inspection
from mxtorq.reports.pages import markdown_of, page_of, read_record


def test_there_and_back() -> None:
    assert Inspection.from_json(INSPECTION.to_json()) == INSPECTION


def edited(change: Any) -> str:
    content = json.loads(INSPECTION.to_json())
    change(content)
    return json.dumps(content)


def first(content: Any) -> Any:
    return content["sites"][0]["methods"]["identity"]["inputs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(schema="mxtorq.results"), r"mxtorq\.results"),
        (lambda c: c.pop("sites"), "sites"),
        (lambda c: c.update(sites=5), "sites"),
        (lambda c: c.update(sites=[5]), "a site of type int"),
        (lambda c: c.update(extra=1), "extra"),
        (lambda c: c["sites"][0].update(methods={}), "under"),
        (lambda c: c.update(methods=["torq", "identity"]), "under the methods"),
        (lambda c: c["harm"].pop(), "harm of 3"),
        (lambda c: c.update(calibration={"source": "c"}), "without tokens"),
        (lambda c: c["sites"][0].pop("massive_tokens"), "Token of type NoneType"),
        (lambda c: c["sites"][0].update(width=96), "width 96"),
        (lambda c: c["harm"].append(3), "a harm of type int"),
        (lambda c: first(c).update(code_counts=[1] * 15), "15"),
        (lambda c: first(c)["code_counts"].__setitem__(0, 41), "129 codes"),
        (lambda c: first(c)["scale_exponents"].update({"9": 1}), "5 scales"),
        (lambda c: first(c).update(scale_exponents={"x": 4}), "a scale of"),
        (lambda c: first(c).update(scale_exponents={"-128": 4}), "a scale of"),
        (lambda c: first(c).update(cut=-1), "codes"),
        (lambda c: c["sites"][0]["methods"]["torq"].update(output_error=-0.5), "output error"),
        (lambda c: first(c).update(relative_error=-1.0), "a mean square or an error"),
        (lambda c: first(c)["block_variances"].__setitem__(0, float("inf")), "inf"),
        (lambda c: first(c).update(worst_channels=[{"index": 1}]), "share"),
        (lambda c: first(c).update(rows="2"), "rows is of type int"),
    ],
)
def test_other_records_and_contradictions_are_refused(change: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Inspection.from_json(edited(change))
    assert caught.value.todo


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a record stand, of lists the first."""
    inside: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value[:1]))
    found = [path] if path else []
    for key, each in inside:
        found += places(each, (*path, key))
    return found


@pytest.mark.parametrize("other", [None, -1, 10**30, 0.5, float("nan"), "²", [], {}, [[1]]])
def test_a_record_with_any_other_value_is_refused_or_shown(other: Any) -> None:
    """No reader and no table ends in an error of Python's."""
    small = replace(INSPECTION, sites=INSPECTION.sites[:1], harm=INSPECTION.harm[1::2])
    assert Inspection.from_json(small.to_json()) == small
    for *path, last in places(json.loads(small.to_json())):
        content = json.loads(small.to_json())
        target = content
        for key in path:
            target = target[key]
        target[last] = other
        try:
            read = Inspection.from_json(json.dumps(content))
        except UsageError:
            continue
        markdown(read)
        terminal(read, 80)


@pytest.mark.parametrize("width", [80, 100, 160, None])
def test_no_figure_is_cut(width: int | None) -> None:
    console = Console(width=width or 300, record=True, file=io.StringIO())
    for table in terminal(INSPECTION, width):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert all(len(line.rstrip()) <= (width or 300) for line in text.splitlines())
    assert "5.00 (7.00)" not in text  # max over mean, not over the other block
    assert "1.62 (1.75)" in text  # 3 / 2 and 7 / 4
    assert "[b]|" in text
    assert ("Left out for want of width: variance" in text) is (width in (80, 100))


def test_promises_are_counted_and_harm_is_ranked_by_site() -> None:
    tables = {sheet.title: sheet for sheet in sheets(INSPECTION, None)}
    (promise,) = (sheet for title, sheet in tables.items() if "promises" in title)
    assert promise.lines[0] == ["torq", "inputs", "2 of 2", "2 of 2", "2 of 2", "2 of 2"]
    assert promise.lines[1] == ["torq", "weights", "0 of 2", "0 of 2", "0 of 2", "0 of 2"]
    assert promise.lines[2] == ["torq", "outputs", "-", "-", "-", "0 of 2"]
    (harm,) = (sheet for title, sheet in tables.items() if "hurt" in title)
    assert harm.lines == [
        ["m.0.qkv_in", "0.25000", "0.06250"],
        ["m.1.qkv_in", "0.12500", "0.50000"],
    ]
    alone = replace(INSPECTION, methods=["identity"], harm=[])
    assert len(list(sheets(alone, None))) == len(tables) - 2


def test_long_lists_are_cut_and_say_so() -> None:
    many = replace(INSPECTION, sites=[site(str(at), 2.0) for at in range(14)])
    channels = next(sheet for sheet in sheets(many, 10) if "channels" in sheet.title)
    assert len(channels.lines) == 10
    assert "4 more in --markdown and --json" in channels.notes[0]


def test_markdown_holds_every_site() -> None:
    page = markdown(INSPECTION)
    assert page.startswith("    mxtorq inspect x\n")
    assert "Every site: weights" in page
    assert "'[b]\\|'" in page  # a bar of a token's own is none of the table's
    assert "2^-2 █  ▃ 2^1" in page


def test_bars() -> None:
    assert bars([0, 1, 8]) == " ▂█"
    assert bars([0.0, 0.0]) == "  "
    assert bars([1e-9, 1.0]) == "▁█"
    assert len(bars(list(range(100)))) == 24
    assert bars([1, 1, 1, 8], most=2) == "▂█"


def test_the_page_has_the_figures_of_the_record_and_pictures_of_the_worst_sites() -> None:
    assert read_record(INSPECTION.to_json(), "it") == INSPECTION
    assert markdown_of(INSPECTION) == markdown(INSPECTION)
    page = page_of(INSPECTION)
    blocks = [block for section in page.sections for block in section.blocks]
    tables = [block for block in blocks if isinstance(block, Grid)]
    assert [table.title for table in tables] == [sheet.title for sheet in sheets(INSPECTION, None)]
    folded = [block.title for block in blocks if isinstance(block, Fold)]
    assert folded == ["Every site: inputs", "Every site: weights"]
    loud, codes, scales, errors = [block.charts for block in blocks if isinstance(block, Charts)]
    assert [chart.title for chart in loud] == ["m.1.qkv_in"]  # the more uneven one
    bars_of = loud[0].drawing
    assert isinstance(bars_of, Bars)
    assert bars_of.panels == (
        ("identity", (("0", 0.25), ("1", 1.75))),
        ("torq", (("0", 1.0), ("1", 1.0))),
    )
    for chart in (*codes, *scales):
        assert isinstance(chart.drawing, Bars)
        for _, values in chart.drawing.panels:
            assert sum(value for _, value in values) == pytest.approx(1)
    exponents = [name for name, _ in scales[0].drawing.panels[0][1]]  # type: ignore[union-attr]
    assert exponents == ["-2", "-1", "0", "1"]
    heat = errors[0].drawing
    assert isinstance(heat, Heat)
    assert heat.kinds == ("qkv_in",)
    assert heat.layers == ("0", "1")
    assert [decibels for _, method, decibels in heat.lines if method == "torq"] == [((30.0, 30.0),)]


def test_many_blocks_are_shown_by_the_loudest_of_neighbours() -> None:
    wide = replace(
        picture(),
        rows=1,
        block_variances=[1.0] * 447 + [9.0],
        code_counts=[448 * 32, *[0] * 15],
        scale_exponents={"0": 448},
    )
    one = site("0", 3.0)
    methods = {"identity": replace(one.methods["identity"], inputs=wide)}
    one = replace(one, width=448 * 32, methods=methods)
    page = page_of(replace(INSPECTION, methods=["identity"], sites=[one], harm=[]))
    (chart,) = page.sections[0].blocks[0].charts  # type: ignore[union-attr]
    ((_, values),) = chart.drawing.panels  # type: ignore[union-attr]
    assert len(values) == 64
    mean = (447 + 9) / 448
    assert values[-1] == ("441", pytest.approx(9 / mean))
    assert values[0] == ("0", pytest.approx(1 / mean))
