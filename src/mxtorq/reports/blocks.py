"""What a page of a report is made of, as data: sections of text, tables, facts and charts.

The one idea: a page knows what it says and not how it looks. A record becomes a page once
(`pages`), and the page becomes HTML (`html`) or Markdown (`markdown`). A chart is the numbers
that it shows and their words; only HTML draws it, so that Markdown needs no plotting library and a
chart can be tested without looking at it. Every number of a chart also stands in a table.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

_WIDE = 8
"""Times the median: beyond it the dots of a linear axis lie on each other."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A line of a dot plot."""

    label: str
    series: str
    """Which colour and shape."""
    values: tuple[float, ...]
    """One a seed; not finite where a method failed."""
    mean: float
    shown: str
    """The mean as written at the end of the line."""
    interval: tuple[float, float] | None = None
    """Where the figure lies at a level of 95 %, if that is known."""


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Lines of dots around a place that means something, each with its mean."""

    dots: tuple[Dot, ...]
    series: tuple[str, ...]
    """All of the page, so that colours mean the same in each chart."""
    axis: str
    zero: str
    """What the line at that place is."""
    bounds: tuple[float, float]
    """Of the values of all charts that are to be compared with this one."""
    bend: float | None
    """Where the axis turns logarithmic, on both sides of zero; nowhere if None."""
    apart: bool = False
    """Drawn hollow: figures of another kind than those beside them."""
    origin: float | None = 0.0
    """That place; None where there is none."""
    band: tuple[float, float] | None = None
    """Its own interval."""


@dataclass(frozen=True, kw_only=True)
class Heat:
    """Signal to noise by kind of site and layer, a line a method."""

    lines: tuple[tuple[str, str, tuple[tuple[float | None, ...], ...]], ...]
    """Heading (of a group of lines), label, and for each kind the decibels layer by layer."""
    kinds: tuple[str, ...]
    layers: tuple[str, ...]
    bounds: tuple[float, float]
    """Decibels, of all charts that are to be compared with this one."""


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A point of a scatter plot."""

    label: str
    series: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """What costs how much and loses how much: best at the lower left."""

    spots: tuple[Spot, ...]
    series: tuple[str, ...]
    x_axis: str
    y_axis: str
    zero: str
    """What the line at y = 0 is."""
    x_bend: float | None
    y_bend: float | None


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars from zero, such as layer by layer, a panel a kind of site; one scale for all panels."""

    panels: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
    """Title, and (what it is of, value) of each bar."""
    x_axis: str
    y_axis: str


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Which of a few names stands where, such as a line a layer and a column a kind of site."""

    lines: tuple[tuple[str, tuple[str, ...]], ...]
    """Label, and the name in each column; empty where there is none."""
    columns: tuple[str, ...]
    names: tuple[str, ...]
    """All of them, the most frequent first."""
    axis: str
    """What lines are."""


Drawing = Dots | Heat | Scatter | Bars | Tiles


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing and its words."""

    title: str
    description: str
    """What somebody is told who does not see it."""
    drawing: Drawing


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table. A column of numbers and dashes alone is one of numbers."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    """Lines that others are measured against."""


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to be typed or kept as they are."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Charts:
    """Charts that stand beside each other."""

    title: str
    charts: tuple[Chart, ...]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """What few readers need, one click away."""

    title: str
    blocks: tuple["Block", ...]


Block = Grid | Facts | Note | Code | Charts | Fold


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All of it, and the record that it was made from."""

    title: str
    lead: str
    """What was done, in a sentence or two."""
    sections: tuple[Section, ...]
    record: str
    """The JSON text."""
    file: str
    """The name to save that text under."""


def number(text: str) -> float | None:
    """The number that a cell begins with (``1,234``, ``+5.04 %``, ``61.5 ± 0.2``), if any.

    That of a bound (``>= 1.23 x``) is the bound.
    """
    words = text.removeprefix(">=").replace(",", "").split()
    try:
        return float(words[0]) if words else None
    except ValueError:
        return None


def numeric(lines: Sequence[Sequence[str]], column: int) -> bool:
    """Whether a column holds numbers, and dashes where there is none."""
    cells = [line[column] for line in lines]
    known = [cell for cell in cells if cell not in ("-", "")]
    return bool(known) and all(number(cell) is not None for cell in known)


def bend_of(values: Iterable[float]) -> float | None:
    """Where an axis has to turn logarithmic for the bulk of values to be told apart, if it has to.

    A power of ten at or below the quarter of the smallest that are not zero.
    """
    sizes = sorted(abs(value) for value in values if value and math.isfinite(value))
    if not sizes or sizes[-1] <= _WIDE * median(sizes):
        return None
    return float(10 ** math.floor(math.log10(sizes[len(sizes) // 4])))
