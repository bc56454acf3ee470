"""The paper that charts are drawn on, and what of matplotlib's SVG goes into a page.

Places are given in units from the upper left corner, as on paper. What matplotlib writes is cut
down to what HTML needs: text stays text in the font of the page, colours become variables of its
style sheet (light and dark follow without a second drawing), and names are those of the chart, so
that two charts can stand in one page. The same drawing gives the same bytes: no date, no random
names, no settings of the reader's.

Colours are those of Okabe and Ito (2008), which people of all kinds of colour vision tell apart,
and every series has a shape of its own besides.
"""

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from mxtorq.reports.blocks import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FONTS = re.compile(r"font-family: [^;]*;? ?")
_SHORT_FONT = re.compile(r"font: (?:[a-z0-9 ]+ )?([0-9.]+px) [^;]*")
"""Older releases write fonts so."""
_DIGITS = re.compile(r"-?[0-9]+\.[0-9]{3,}(?:e-?[0-9]+)?")
Units = int | float
WIDTH = 380
"""Units of every chart."""
_LABEL = 20
"""Characters of a line of a label."""
_SIZE, SMALL = 11, 10
"""Of letters, in the same units."""
INK, MUTED, _GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0400{at:02x}" for at in range(1, 7))
_SHAPES = ("o", "s", "^", "D", "v", "P")
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    _GRID: "var(--line)",
    **{colour: f"var(--series-{at})" for at, colour in enumerate(SERIES, 1)},
}
"""Colours that nobody would choose stand for those of the style sheet."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mxtorq",
    "font.size": _SIZE,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": SMALL,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "figure.facecolor": "none",
    "figure.dpi": 72,
}


class Sheet:
    """A figure addressed in units from its upper left corner."""

    def __init__(self, height: Units) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(WIDTH / 72, height / 72))
        self.tips: dict[str, str] = {}

    def axes(self, left: Units, top: Units, width: Units, height: Units) -> "Axes":
        below = self.height - top - height
        box = (left / WIDTH, below / self.height, width / WIDTH, height / self.height)
        return self.figure.add_axes(box)

    def text(self, x: Units, y: Units, text: str, **how: Any) -> None:
        self.figure.text(x / WIDTH, 1 - y / self.height, plain(text), **{"va": "center", **how})

    def mark(self, x: Units, y: Units, series: int, hollow: bool = False) -> None:
        from matplotlib.lines import Line2D

        place = self.figure.transFigure
        how = marker(series, hollow)
        self.figure.add_artist(
            Line2D([x / WIDTH], [1 - y / self.height], transform=place, linestyle="none", **how)
        )

    def tip(self, text: str) -> str:
        """The name of an element that says this when somebody points at it."""
        self.tips[f"tip{len(self.tips)}"] = text
        return f"tip{len(self.tips) - 1}"

    def legend(self, series: tuple[str, ...], used: set[str], hollow: bool = False) -> None:
        """A line each, from the top."""
        for at, name in enumerate(name for name in series if name in used):
            self.mark(8, 9 + 15 * at, series.index(name), hollow)
            self.text(18, 9 + 15 * at, name, color=MUTED, size=SMALL)


def plain(text: str) -> str:
    """A text without characters that XML cannot hold."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def marker(series: int, hollow: bool = False, size: Units = 7) -> dict[str, Any]:
    """How a point of a series is drawn."""
    colour = SERIES[series % len(SERIES)]
    return {
        "marker": _SHAPES[(series + series // len(SERIES)) % len(_SHAPES)],
        "markersize": size,
        "markerfacecolor": "none" if hollow else colour,
        "markeredgecolor": colour,
        "markeredgewidth": 1.4 if hollow else 0,
    }


def scale(axes: "Axes", which: str, bounds: tuple[Units, Units], bend: float | None) -> None:
    """Limits with air at the ends, and ticks that do not run into each other."""
    low, high = bounds
    limit = axes.set_xlim if which == "x" else axes.set_ylim
    if bend is None:
        air = 0.06 * ((high - low) or 1)
        limit(low - (air if low else 0), high + air)
        ticks(axes, which, 4)
        return
    (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", linthresh=bend)
    least, most = min(1.6 * low, 0), 1.6 * high
    limit(least, most)
    places = [0.0]
    for power in range(round(math.log10(bend)), math.floor(math.log10(max(most, -least))) + 1):
        places += [sign * 10.0**power for sign in (-1, 1) if least <= sign * 10.0**power <= most]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(sorted(places), [short(place) for place in sorted(places)])
    axis.set_ticks([], minor=True)


def ticks(axes: "Axes", which: str, most: int) -> None:
    """At round values of a linear axis, as few letters as possible."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def broken(label: str) -> list[str]:
    """A label in lines, broken where an option begins if that is possible."""
    lines = [""]
    for piece in re.split(r"(?<=[:=_.])", label):
        if len(lines[-1]) + len(piece) > _LABEL and lines[-1]:
            lines.append("")
        lines[-1] += piece
    return [line[at : at + _LABEL] for line in lines for at in range(0, len(line) or 1, _LABEL)]


def short(value: Units) -> str:
    """319488 as 319k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def written(chart: Chart, key: str, draw: Callable[[], Sheet]) -> str:
    """What is drawn, as an ``<svg>`` element that a page can hold under that name."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's own font lacks
        sheet = draw()
        page = io.StringIO()
        FigureCanvasSVG(sheet.figure).print_svg(page, metadata={"Date": None})
    root = ET.fromstring(page.getvalue())
    linked = set(re.findall(r"""(?:url\(|href=")#([^")]+)""", page.getvalue()))
    inner = "".join(_element(child, key, linked, sheet.tips) for child in root)
    return (
        f'<svg role="img" aria-label="{escape(chart.title)}" aria-describedby="{key}-d" '
        f'viewBox="0 0 {WIDTH} {sheet.height:g}">'
        f'<desc id="{key}-d">{escape(chart.description)}</desc>{inner}</svg>'
    )


def _element(node: ET.Element, key: str, linked: set[str], tips: Mapping[str, str]) -> str:
    """An element of matplotlib's without what a page has no use for."""
    tag = node.tag.rpartition("}")[2]
    if tag in ("metadata", "style"):
        return ""
    name = node.attrib.get("id", "")
    attributes = {
        attribute.rpartition("}")[2]: _value(value, key)
        for attribute, value in node.attrib.items()
        if attribute != "id" and not value.startswith("rotate(-0 ")
    }
    if name in linked:
        attributes["id"] = f"{key}-{name}"
    if "href" in attributes:
        attributes["href"] = f"#{key}-{attributes['href'].removeprefix('#')}"
    inner = f"<title>{escape(tips[name])}</title>" if name in tips else ""
    inner += escape((node.text or "").strip())
    inner += "".join(_element(child, key, linked, tips) for child in node)
    shown = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
    if tag in ("g", "defs") and not inner:
        return ""
    return f"<{tag}{shown}>{inner}</{tag}>"


def _value(text: str, key: str) -> str:
    """An attribute with names, colours, fonts and digits of the page."""
    text = text.replace("url(#", f"url(#{key}-")
    text = _SHORT_FONT.sub(r"font-size: \1", _FONTS.sub("", " ".join(text.split())))
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return _DIGITS.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), text)
