"""What pages say: the order of lines, which figures stand under which heading, and Markdown."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from mxtorq.evaluation.tasks import SUITES
from mxtorq.reports import markdown as plain
from mxtorq.reports.blocks import (
    Bars,
    Block,
    Chart,
    Charts,
    Dots,
    Fold,
    Grid,
    Heat,
    Note,
    Page,
    Scatter,
)
from mxtorq.reports.pages import page_of
from mxtorq.reports.pages.lines import lines_of
from mxtorq.reports.pages.sites import by_kind, decibels
from mxtorq.reports.published import read_published
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


def charts_of_blocks(blocks: tuple[Block, ...]) -> list[Chart]:
    return [chart for block in blocks if isinstance(block, Charts) for chart in block.charts]


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


def test_losses_have_their_intervals_where_windows_are_known() -> None:
    """Of a loss that is the same in each window, nothing is left open."""
    text = {"evaluation": {"source": "a", "tokens": 9, "seqlen": 2}}

    def known(method: str, nll: float, **changes: object) -> Row:
        more = {"nll": nll / 9, "windows": {"nll": [nll / 9] * 9}, "provenance": text, **changes}
        return row(method, math.exp(nll / 9), **more)

    plain = known("bf16", 9.0, rounding=None, scale_rule=None, seed=None)
    rows = (plain, known("torq", 18.0), known("torq", 27.0, seed=1), known("wush", 36.0))
    results = Results(rows=rows, versions={})
    spread, single = lines_of(results)
    assert single.interval == pytest.approx((100 * math.expm1(3), 100 * math.expm1(3)))
    # Student's with one degree of freedom, of 1 and 2: 1.5 +- 12.7062 / 2
    ends = [100 * math.expm1(1.5 + sign * 12.7062 / 2) for sign in (-1, 1)]
    assert spread.interval == pytest.approx(ends)
    (drawing,) = [c.drawing for c in charts_of(page_of(results)) if isinstance(c.drawing, Dots)]
    assert [dot.interval for dot in drawing.dots] == [spread.interval, single.interval]
    assert drawing.bounds == (ends[0], max(single.losses))  # the other end is beyond any chart
    assert lines_of(RESULTS)[0].interval is None
    notes = [b.text for s in page_of(results).sections for b in s.blocks if isinstance(b, Note)]
    assert any("95 % interval of its loss" in note for note in notes)


def answers(value: float, stderr: float | None = 0.02) -> dict[str, dict[str, object]]:
    one = {"metric": "acc", "value": value, "stderr": stderr, "metrics": {"acc": value}}
    more = {"documents": 9, "shots": 0, "truncated": 0, "version": "1", "prompts_sha256": "a"}
    return {"piqa": one | more}


def test_accuracies_are_charts_beside_bf16_and_a_table() -> None:
    rows = (
        replace(base(), tasks=answers(0.75)),
        row("torq", 3.0, tasks=answers(0.5)),
        row("torq", 3.0, tasks=answers(0.75), seed=1),
        row("wush", 3.0, tasks=answers(0.7, None)),
        row("wush", 3.0, tasks=answers(0.99), scale_rule="even"),
        row("quarot", 2.0),  # was not asked
        row("wush", 8.0, outliers="llm", tasks=answers(0.25)),
    )
    page = page_of(Results(rows=rows, versions={"lm_eval": "1"}))
    section = next(s for s in page.sections if s.title == "Accuracy on tasks")
    charts = [c for block in section.blocks if isinstance(block, Charts) for c in block.charts]
    assert [chart.title for chart in charts] == [
        *(f"piqa. Scale rule {rule}" for rule in ("floor", "even", "floor"))
    ]
    floor, even, llm = (chart.drawing for chart in charts if isinstance(chart.drawing, Dots))
    assert [(dot.label, dot.values, dot.interval) for dot in floor.dots] == [
        ("wush", (70.0,), None),
        ("torq", (50.0, 75.0), None),  # what two seeds scatter is no standard error
    ]
    assert floor.origin == even.origin == 75.0
    assert floor.band == pytest.approx((75 - 3.92, 75 + 3.92))
    assert even.dots[0].interval == pytest.approx((99 - 3.92, 100.0))  # nothing is beyond all right
    assert floor.bounds == even.bounds == (50.0, 100.0)
    assert (llm.origin, llm.band) == (None, None)
    assert "BF16: 75.00 ± 2.00 %" in charts[0].description
    (grid,) = grids_of(section.blocks)
    assert grid.columns == ("method", "outliers", "rounding", "scale rule", "piqa")
    assert [line[-1] for line in grid.lines] == [
        *("75.00 ± 2.00", "62.50 ± 17.68", "70.00", "99.00 ± 2.00", "25.00 ± 2.00")
    ]
    assert grid.strong == {0}
    assert "| torq (2 seeds) | none | gptq | floor | 62.50 ± 17.68 |" in plain.markdown(page)
    assert all(s.title != "Accuracy on tasks" for s in page_of(RESULTS).sections)


def test_tasks_are_folded_where_there_is_an_average() -> None:
    names = [task.label for task in SUITES["acc5"]]
    tasks = {name: answers(0.5)["piqa"] for name in names}
    rows = (base(), row("torq", 3.0, tasks=tasks, averages={"acc5": 0.5}))
    section = next(
        s for s in page_of(Results(rows=rows, versions={})).sections if "Accuracy" in s.title
    )
    assert [chart.title.partition(".")[0] for chart in charts_of_blocks(section.blocks)] == ["acc5"]
    (fold,) = [block for block in section.blocks if isinstance(block, Fold)]
    assert [c.title.partition(".")[0] for c in charts_of_blocks(fold.blocks)] == names


def test_published_figures_are_a_table_of_the_page() -> None:
    path = Path(__file__).parents[3] / "docs" / "published.toml"
    text = {"source": "wikitext2", "tokens": 9, "seqlen": 2048}
    ours = row("identity", 9.0, rounding="rtn")
    ours = replace(ours, provenance={"model": "Llama-3-8B", "evaluation": text})
    results = Results(rows=(ours,), versions={})
    page = page_of(results, read_published(path))
    section = next(s for s in page.sections if s.title == "Beside published figures")
    (grid,) = grids_of(section.blocks)
    assert grid.columns[:2] == ("model", "row of ours")
    (line,) = [line for line in grid.lines if line[1] == "identity rtn" and line[5] == "8.230"]
    assert (line[4], line[6], line[7]) == ("9.000", "+0.770", "unknown")
    assert any(line[7] == "published, not run here" for line in grid.lines)
    assert page.record == page_of(results).record  # which draws this page without them
    assert all("published" not in s.title for s in page_of(results).sections)


def test_fidelity_is_a_table_of_the_page() -> None:
    close = row(
        "torq", 3.0, kl=0.5, kl_p99=0.75, agreement=0.625, layer_errors={"a": 0.1, "b": 0.001}
    )
    section = next(
        s
        for s in page_of(Results(rows=(base(), close), versions={})).sections
        if s.title == "All figures"
    )
    grid = grids_of(section.blocks)[-1]
    assert grid.title == "OCP MXFP4: fidelity to BF16"
    assert grid.lines == (
        *(("torq", "none", "gptq", "floor", "0.5000", "-", "0.750", "62.50 %", "10.0 / 30.0 dB"),),
    )


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
