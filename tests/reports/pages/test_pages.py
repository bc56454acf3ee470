"""What pages say: the order of lines, which figures stand under which heading, and Markdown."""

import math
from dataclasses import replace
from pathlib import Path

from mxtorq.reports import markdown as plain
from mxtorq.reports.blocks import Bars, Block, Chart, Charts, Dots, Fold, Grid, Heat, Page, Scatter
from mxtorq.reports.pages import page_of
from mxtorq.reports.pages.lines import lines_of
from mxtorq.reports.pages.sites import by_kind, decibels
from mxtorq.reports.schema import Results, Row

RECORDS = Path(__file__).parents[3] / "docs" / "results"


def row(method: str, perplexity: float, **changes: object) -> Row:
    values: dict[str, object] = {
        "method": method,
        "rounding": "gptq",
        "scale_rule": "floor",
        "perplexity": perplexity,
        "nll": 1.0,
        "predictions": 9,
        "seed": 0,
        "outliers": None,
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


def base(outliers: str | None = None) -> Row:
    return row("bf16", 2.0, rounding=None, scale_rule=None, seed=None, outliers=outliers)


RESULTS = Results(
    rows=(
        base(),
        row("torq", 4.0),
        row("torq", 3.0, seed=1),
        row("wush", 3.0),
        row("failed", math.inf),
        row("gains", 1.9),
        row("wush", 2.0, scale_rule="log256", ocp=False),
        row("wush", 2.5, scale_rule="even"),
        base("llm"),
        row("wush", 8.0, outliers="llm"),
    ),
    versions={"mxtorq": "0"},
)


def charts_of(page: Page) -> list[Chart]:
    return [
        chart
        for section in page.sections
        for block in section.blocks
        if isinstance(block, Charts)
        for chart in block.charts
    ]


def grids_of(blocks: tuple[Block, ...]) -> list[Grid]:
    found = []
    for block in blocks:
        if isinstance(block, Fold):
            found += grids_of(block.blocks)
        elif isinstance(block, Grid):
            found.append(block)
    return found


def test_lines_stand_by_profile_rule_and_loss_and_failures_last() -> None:
    lines = [(x.first.outliers, x.rule, x.first.method) for x in lines_of(RESULTS)]
    assert lines == [
        (None, "floor", "gains"),
        (None, "floor", "wush"),
        (None, "floor", "torq"),
        (None, "floor", "failed"),
        (None, "even", "wush"),
        (None, "log256", "wush"),
        ("llm", "floor", "wush"),
    ]
    torq = next(line for line in lines_of(RESULTS) if line.first.method == "torq")
    assert torq.losses == (100.0, 50.0)
    assert torq.mean == 75.0


def test_every_chart_of_losses_names_its_rule_and_profiles_share_their_limits() -> None:
    charts = [chart for chart in charts_of(page_of(RESULTS)) if isinstance(chart.drawing, Dots)]
    titles = ["floor", "even", "log256 (not OCP: no hardware has these scales)", "floor"]
    assert [chart.title for chart in charts] == [f"Scale rule {title}" for title in titles]
    drawings = [chart.drawing for chart in charts if isinstance(chart.drawing, Dots)]
    low, high = drawings[0].bounds
    assert -5.1 < low < -4.9
    assert high == 100.0
    assert {drawing.bounds for drawing in drawings[:3]} == {drawings[0].bounds}
    assert drawings[3].bounds == (0.0, 300.0)
    assert [drawing.apart for drawing in drawings] == [False, False, True, False]
    assert drawings[0].dots[2].values == (100.0, 50.0)
    assert drawings[0].dots[3].shown == "+inf %"


def test_a_table_has_one_baseline_and_the_telling_figure_on_the_left() -> None:
    section = next(s for s in page_of(RESULTS).sections if s.title == "All figures")
    grids = grids_of(section.blocks)
    assert [grid.title for grid in grids] == [
        "The model as it is. OCP MXFP4. Scale rules: floor, even.",
        "Outliers of llm. OCP MXFP4. Scale rule: floor.",
        "The model as it is. Not OCP: scales that no hardware has, shown to explain published "
        "numbers. Scale rule: log256.",
    ]
    assert all(grid.strong == {0} for grid in grids)
    assert grids[0].columns[:5] == ("method", "rounding", "scale rule", "vs BF16", "perplexity")
    assert grids[0].lines[1][:3] == ("torq", "gptq", "floor")
    assert grids[0].lines[1][3] == "+75.00 ± 35.36 %"
    assert grids[0].lines[1][-1] == "2"


def test_sites_by_kind_and_layer() -> None:
    errors = {"model.layers.0.qkv_in": 0.1, "model.layers.10.qkv_in": 0.01, "lm_head": 0.5}
    kinds = by_kind(errors)
    assert kinds == {"qkv_in": {"0": 0.1, "10": 0.01}, "lm_head": {"lm_head": 0.5}}
    assert decibels(errors.values()) == (3.0, 20.0)
    assert decibels([0.0, math.inf]) == (0.0, 1.0)


def test_sites_are_a_heat_map_of_several_methods_and_bars_of_one() -> None:
    sites = {"model.layers.0.qkv_in": 0.1, "model.layers.1.qkv_in": 0.0}
    one = Results(rows=(base(), row("torq", 3.0, site_errors=sites)), versions={})
    (bars,) = [c.drawing for c in charts_of(page_of(one)) if isinstance(c.drawing, Bars)]
    assert bars.panels == (("qkv_in", (("0", 0.1), ("1", 0.0))),)
    two = replace(one, rows=(*one.rows, row("wush", 3.0, site_errors={**sites})))
    (heat,) = [c.drawing for c in charts_of(page_of(two)) if isinstance(c.drawing, Heat)]
    assert [line[:2] for line in heat.lines] == [("gptq", "torq"), ("gptq", "wush")]
    ((loud, exact),) = heat.lines[0][2]
    assert loud is not None
    assert abs(loud - 10.0) < 1e-9
    assert exact == math.inf


def test_costs_are_shown_of_what_hardware_has() -> None:
    names = ("a", "b", "c", "d", "e")
    costs = {"multiply_adds_per_token": 7, "search_seconds": 0.0}
    rows = [row(name, 3.0, **costs) for name in names]
    strange = [replace(each, ocp=False, scale_rule="log256") for each in rows]
    charts = charts_of(page_of(Results(rows=(base(), *rows, *strange), versions={})))
    (cloud,) = [c for c in charts if isinstance(c.drawing, Scatter)]
    assert cloud.title == "Scale rule floor: loss against run-time cost"


def test_markdown_holds_the_tables_and_no_markup_of_the_record() -> None:
    text = plain.markdown(page_of(replace(RESULTS, command="mxtorq <x> | y")))
    assert "| method | rounding | scale rule | vs BF16 |" in text
    assert "| torq | gptq | floor | +75.00 ± 35.36 % |" in text
    assert "    mxtorq <x> | y" in text
    rows = (base(), row("a|b<i>", 3.0))
    assert "a\\|b\\<i>" in plain.markdown(page_of(replace(RESULTS, rows=rows)))
