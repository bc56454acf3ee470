"""What pages say of a method that chooses, and that others have no such section."""

from dataclasses import replace
from typing import Any

from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.reports import markdown as plain
from mxtorq.reports.blocks import Charts, Facts, Fold, Grid, Page, Section, Tiles
from mxtorq.reports.pages import page_of
from mxtorq.reports.pages.choices import TITLE
from mxtorq.reports.schema import Results, Row


def site(name: str, choice: dict[str, Any] | None = None) -> SiteEntry:
    return SiteEntry(
        site=name,
        linears=["a"],
        width=64,
        kind="chain",
        multiply_adds=5,
        extra_bytes=7,
        output_error=0.25,
        choice=choice,
    )


def choice(candidate: str, losses: dict[str, float], **at_least: float) -> dict[str, Any]:
    return {"candidate": candidate, "losses": losses, "at_least": at_least}


SITES = [
    site("m.layers.0.qkv_in", choice("wush", {"wush": 0.5, "layer-32": 0.75}, identity=0.625)),
    site("m.layers.0.down_in", choice("layer-32", {"layer-32": 0.25, "wush": 0.5, "identity": 1})),
    site("m.layers.1.qkv_in", choice("layer-32", {"layer-32": 1.0})),
    site("m.layers.1.down_in"),
    site("lm_head", choice("perq", {"perq": 1.0}, wush=1.5)),
]
MANIFEST = Manifest(
    method="mxtorq",
    rounding="gptq",
    recipe={"method": {"name": "mxtorq"}, "rounding": {"name": "gptq"}},
    scale_rules={"weights": "floor", "activations": "floor"},
    seed=3,
    source={"model": "m", "family": "llama", "baseline_dtype": "bf16", "outliers": None},
    calibration={"source": "stdlib", "tokens": 64, "seqlen": 32, "seed": 3},
    versions={"mxtorq": "0"},
    sites=SITES,
    unfit={},
    files={},
)
ROW = Row(
    method="mxtorq",
    rounding="gptq",
    scale_rule="floor",
    perplexity=3.0,
    nll=1.0,
    predictions=9,
    seed=0,
    outliers=None,
    choices={"m.layers.0.qkv_in": "wush", "m.layers.0.down_in": "layer-32"},
)


def section_of(page: Page) -> Section:
    return next(section for section in page.sections if section.title == TITLE)


def test_a_checkpoint_says_what_was_chosen_where_and_why() -> None:
    section = section_of(page_of(MANIFEST))
    _, facts, counted, charts, why = section.blocks
    assert isinstance(facts, Facts)
    assert dict(facts.pairs) == {
        "taken": "layer-32 at 2 of 4 sites, wush at 1, perq at 1",
        "identity in its place": ">= 2.62 x the loss at the median site",
        "wush in its place": ">= 1.50 x the loss at the median site",
    }
    assert isinstance(counted, Grid)
    assert counted.columns == ("candidate", "all", "qkv_in", "down_in", "lm_head")
    assert counted.lines == (
        ("layer-32", "2", "1", "1", "-"),
        ("wush", "1", "1", "-", "-"),
        ("perq", "1", "-", "-", "1"),
    )
    assert isinstance(charts, Charts)
    drawing = charts.charts[0].drawing
    assert isinstance(drawing, Tiles)
    assert drawing.names == ("layer-32", "wush", "perq")
    assert drawing.columns == ("qkv_in", "down_in", "lm_head")
    assert drawing.lines == (
        ("0", ("wush", "layer-32", "")),
        ("1", ("layer-32", "", "")),
        ("lm_head", ("", "", "perq")),
    )
    assert isinstance(why, Fold)
    (grid,) = why.blocks
    assert isinstance(grid, Grid)
    assert grid.columns[-2:] == ("identity loses", "wush loses")
    assert [line[1:] for line in grid.lines] == [
        ("wush", "5.000e-01", "identity", ">= +25.00 %", ">= 1.25 x", "1.00 x"),
        ("layer-32", "2.500e-01", "wush", "+100.00 %", "4.00 x", "2.00 x"),
        ("layer-32", "1.000e+00", "-", "-", "-", "-"),
        ("perq", "1.000e+00", "wush", ">= +50.00 %", "-", ">= 1.50 x"),
    ]
    assert "| layer-32 | 2 | 1 | 1 | - |" in plain.markdown(page_of(MANIFEST))


def test_rows_say_what_was_chosen_over_all_their_seeds() -> None:
    rows = (ROW, replace(ROW, seed=1), replace(ROW, method="wush", choices={}))
    section = section_of(page_of(Results(rows=rows, versions={})))
    (grid,) = section.blocks
    assert isinstance(grid, Grid)
    assert "mxtorq, gptq, scale rule floor, 2 seeds" in grid.title
    assert grid.lines == (("wush", "2", "2", "-"), ("layer-32", "2", "-", "2"))


def test_where_nothing_was_chosen_no_section_says_so() -> None:
    none = replace(MANIFEST, sites=[replace(each, choice=None) for each in SITES])
    without = Results(rows=(replace(ROW, choices={}),), versions={})
    for record in (none, without):
        page = page_of(record)
        assert TITLE not in [section.title for section in page.sections]
        assert "hosen" not in plain.markdown(page)
