"""Charts: honest axes, words as text, and nothing that two charts of a page would share."""

import importlib.util
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from mxtorq.errors import UsageError
from mxtorq.reports import charts
from mxtorq.reports.blocks import (
    Bars,
    Chart,
    Dot,
    Dots,
    Drawing,
    Heat,
    Scatter,
    Spot,
    Tiles,
    bend_of,
    number,
    numeric,
)
from mxtorq.reports.charts import front, require_charts, svg
from mxtorq.reports.sheet import marker, short

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="charts need the extra `report`"
)


def dot(label: str, *values: float, series: str = "gptq") -> Dot:
    mean = sum(values) / len(values)
    return Dot(label=label, series=series, values=values, mean=mean, shown=f"{mean:+.2f} %")


DOTS = Dots(
    dots=(dot("wush", 1.0, 3.0), dot("torq", 5.0, series="rtn"), dot("failed", math.inf)),
    series=("gptq", "rtn"),
    axis="loss, %",
    zero="BF16",
    bounds=(0.0, 5.0),
    bend=None,
)
HEAT = Heat(
    lines=(("rtn", "torq", ((10.0, None), (math.inf, -math.inf))),),
    kinds=("qkv_in", "down_in"),
    layers=("0", "1"),
    bounds=(10.0, 20.0),
)
SPOTS = (
    Spot(label="free", series="rtn", x=0.0, y=5.0),
    Spot(label="worse", series="rtn", x=10.0, y=6.0),
    Spot(label="good", series="rtn", x=20.0, y=2.0),
    Spot(label="same cost", series="rtn", x=20.0, y=3.0),
)
SCATTER = Scatter(
    spots=SPOTS, series=("rtn",), x_axis="MACs", y_axis="%", zero="BF16", x_bend=None, y_bend=None
)
BARS = Bars(
    panels=(("qkv_in", (("0", 0.5), ("1", 0.25))), ("down_in", (("0", 0.01),))),
    x_axis="layer",
    y_axis="error",
)
PLACED = replace(
    DOTS,
    dots=tuple(replace(each, interval=(each.mean - 1, each.mean + 9)) for each in DOTS.dots[:2]),
    bounds=(1.0, 5.0),
    origin=2.0,
    band=(1.5, 2.5),
)
NOWHERE = replace(DOTS, origin=None)
TILES = Tiles(
    lines=(("0", ("wush", "torq")), ("1", ("wush", "")), ("12", ("torq", "wush"))),
    columns=("qkv_in", "down_in"),
    names=("wush", "torq"),
    axis="layer",
)
CROWDED = replace(
    TILES,
    lines=(
        ("a long name of no layer at all", ("torq",) * 7),
        *((str(n), ("wush",) * 7) for n in "12"),
    ),
    columns=tuple(f"gate_up_{at}" for at in range(7)),
)
ALL = (
    *(DOTS, PLACED, NOWHERE, replace(DOTS, bend=1.0, apart=True)),
    *(HEAT, SCATTER, BARS, TILES, CROWDED),
)


def chart(drawing: Drawing) -> Chart:
    return Chart(title="a <title>", description="what & why", drawing=drawing)


@needs_matplotlib
@pytest.mark.parametrize("drawing", ALL)
def test_a_chart_is_an_element_with_words_and_names_of_its_own(drawing: Drawing) -> None:
    first, second = svg(chart(drawing), "a"), svg(chart(drawing), "b")
    root = ET.fromstring(first)
    assert root.tag == "svg"
    assert root.get("aria-label") == "a <title>"
    assert root.findtext("desc") == "what & why"
    assert list(root.iter("text"))
    assert svg(chart(drawing), "a") == first
    names = [set(re.findall(r'id="([^"]+)"', text)) for text in (first, second)]
    assert names[0]
    assert not names[0] & names[1]
    for found in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', first):
        assert "".join(found) in names[0]
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]|font-family|metadata", first)
    assert first.replace("a-", "b-") == second.replace("a-", "b-")


@needs_matplotlib
def test_bars_begin_at_zero_and_panels_share_their_scale() -> None:
    axes = charts._draw(BARS).figure.axes
    assert [each.get_ylim()[0] for each in axes] == [0, 0]
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert axes[0].get_ylim()[1] >= 0.5


@needs_matplotlib
def test_dots_show_zero_every_seed_and_failures() -> None:
    (axes,) = charts._draw(DOTS).figure.axes
    low, high = axes.get_xlim()
    assert low <= 0
    assert high > 5
    seeds = [line.get_xdata() for line in axes.lines if line.get_marker() == "|"]
    assert [1.0, 3.0] in [list(each) for each in seeds]  # type: ignore[arg-type]
    (arrow,) = [line for line in axes.lines if line.get_marker() == ">"]
    assert list(arrow.get_xdata()) == [high]  # type: ignore[arg-type]
    words = svg(chart(DOTS), "a")
    for word in ("wush", "torq", "+2.00 %", "+inf %", "BF16", "loss, %", "rtn"):
        assert word in words
    assert "log beyond" not in words
    assert "loss, % (log beyond 1)" in svg(chart(replace(DOTS, bend=1.0)), "a")


@needs_matplotlib
def test_dots_show_intervals_and_the_place_that_they_are_measured_from() -> None:
    (axes,) = charts._draw(PLACED).figure.axes
    high = axes.get_xlim()[1]
    lines = [list(line.get_xdata()) for line in axes.lines]  # type: ignore[arg-type]
    assert [1.0, high] in lines  # 1 to 11, as far as there is room
    assert [4.0, high] in lines
    assert [2.0, 2.0] in lines
    assert [0.0, 0.0] not in lines
    (band,) = axes.patches
    assert band.get_extents().transformed(axes.transData.inverted()).intervalx == pytest.approx(
        (1.5, 2.5)
    )
    assert "(95 %: 1 to 11)" in svg(chart(PLACED), "a")
    assert "BF16" not in svg(chart(NOWHERE), "a")


@needs_matplotlib
def test_axes_hold_gains_beside_losses() -> None:
    gains = replace(DOTS, dots=(dot("better", -2.0), dot("worse", 300.0)), bounds=(-2.0, 300.0))
    for bend in (None, 1.0):
        (axes,) = charts._draw(replace(gains, bend=bend)).figure.axes
        low, high = axes.get_xlim()
        assert low < -2
        assert high > 300
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert 0 in ticks


@needs_matplotlib
def test_tiles_have_the_colour_and_the_mark_of_their_names() -> None:
    (axes,) = charts._draw(TILES).figure.axes
    marks = {
        line.get_marker(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }  # type: ignore[arg-type]
    assert marks == {
        "o": ([0.5, 0.5, 1.5], [6.0, 18.0, 30.0]),
        "s": ([1.5, 0.5], [6.0, 30.0]),
    }
    assert len(axes.patches) == 5
    colours = [patch.get_facecolor()[:3] for patch in axes.patches]  # type: ignore[index]
    assert colours[0] == colours[2] == colours[4] != colours[1] == colours[3]
    words = svg(chart(TILES), "a")
    for word in ("wush", "torq", "qkv_in", "down_in", "layer", "12"):
        assert f">{word}</text>" in words, word
    assert "<title>layer 12, down_in: wush</title>" in words


def test_the_front_is_what_nothing_beats() -> None:
    assert [spot.label for spot in front(SCATTER)] == ["free", "good"]


def test_an_axis_bends_only_for_values_that_lie_far_apart() -> None:
    assert bend_of([]) is None
    assert bend_of([0.0, math.inf, math.nan]) is None
    assert bend_of([1.0, 2.0, 3.0, 16.0]) is None
    assert bend_of([13.0, 15.0, 20.0, 5000.0]) == 10.0
    assert bend_of([-0.2, 0.3, 0.4, 0.5, 90.0]) == 0.1


def test_cells_are_numbers_or_are_not() -> None:
    assert number("1,234") == 1234.0
    assert number("+5.04 %") == 5.04
    assert number("61.5 ± 0.2") == 61.5
    assert number("-inf dB") == -math.inf
    assert number(">= 1.23 x") == 1.23
    assert number(">= +4.50 %") == 4.5
    assert number(">=") is None
    assert number("-") is None
    assert number("") is None
    assert number("model.layers.0") is None
    lines = [("a", "1", "-", "2 dB"), ("b", "x", "-", "-")]
    assert [numeric(lines, at) for at in range(4)] == [False, False, False, True]


def test_numbers_of_axes_are_short() -> None:
    figures = [0, 0.004, 12.5, 319_488, 2_558_208, 7e9]
    assert [short(figure) for figure in figures] == ["0", "0.004", "12.5", "319k", "2.56M", "7G"]


def test_many_series_look_different() -> None:
    looks = [(m["marker"], m["markeredgecolor"]) for m in map(marker, range(36))]
    assert len(set(looks)) == 36


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"mxtorq\[report\]"):
        require_charts()
    with pytest.raises(UsageError, match="matplotlib"):
        svg(chart(BARS), "a")
