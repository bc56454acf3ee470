"""Charts as SVG: drawn by matplotlib from the numbers of a `blocks.Chart`, coloured by the page.

Every chart is 380 units wide, so that its words can be read on a phone, where a unit is a little
less than a pixel; long lists make it tall, never wide. Nothing is cut: bars start at zero, charts
that stand side by side share their limits, an axis that turns logarithmic says where, and what is
not finite is drawn as an arrow at the edge with its figure beside it. The map of decibels is
cividis, which reads the same for people of all kinds of colour vision.

matplotlib is an optional extra and imported when the first chart is drawn (half a second).
"""

import math
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from mxtorq.errors import UsageError
from mxtorq.reports.blocks import Bars, Chart, Dots, Drawing, Heat, Scatter, Spot, Tiles
from mxtorq.reports.sheet import (
    INK,
    MUTED,
    SERIES,
    SMALL,
    WIDTH,
    Sheet,
    broken,
    marker,
    plain,
    scale,
    short,
    ticks,
    written,
)
from mxtorq.reports.tiles import tiles

_EVERY = [size * 10**power for power in range(9) for size in (1, 2, 5)]
"""Layers from one that is named to the next."""
_STEPS = 24
"""Of the map of decibels."""


def require_charts() -> None:
    """Raises:
    UsageError: the plotting library is not there.
    """
    if find_spec("matplotlib") is None:
        raise UsageError(
            asked="a report (--report)",
            found="no matplotlib",
            why="it draws the charts",
            todo="install it: pip install 'mxtorq[report]'; --json keeps everything that a report "
            "shows, and `mxtorq report` draws it later",
        )


def svg(chart: Chart, key: str) -> str:
    """The chart as an ``<svg>`` element; ``key`` is its name in the page.

    Raises:
        UsageError: the plotting library is not there.
    """
    require_charts()
    return written(chart, key, lambda: _draw(chart.drawing))


def _draw(drawing: Drawing) -> Sheet:
    if isinstance(drawing, Dots):
        return _dots(drawing)
    if isinstance(drawing, Heat):
        return _heat(drawing)
    if isinstance(drawing, Scatter):
        return _scatter(drawing)
    if isinstance(drawing, Tiles):
        return tiles(drawing)
    return _bars(drawing)


def _dots(drawing: Dots) -> Sheet:
    labels = [broken(dot.label) for dot in drawing.dots]
    heights = [6 + 12 * len(lines) for lines in labels]
    used = {dot.series for dot in drawing.dots}
    top = 15 * len(used) + 24
    sheet = Sheet(top + sum(heights) + 36)
    axes = sheet.axes(136, top, 180, sum(heights))
    scale(axes, "x", drawing.bounds, drawing.bend)
    axes.set_ylim(sum(heights), 0)
    axes.yaxis.set_visible(False)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_xlabel(_axis(drawing.axis, drawing.bend))
    low, high = axes.get_xlim()
    if drawing.band is not None:
        axes.axvspan(*drawing.band, color=MUTED, alpha=0.15, linewidth=0)
    if drawing.origin is not None:
        axes.axvline(drawing.origin, color=INK, linewidth=1.2)
        place = axes.transData.transform((drawing.origin, 0))[0]
        sheet.text(place, top - 8, drawing.zero, ha="center", size=SMALL)
    sheet.text(WIDTH - 4, top - 8, "mean", ha="right", size=SMALL, color=MUTED)
    sheet.legend(drawing.series, used, drawing.apart)
    at = 0.0
    for dot, lines, height in zip(drawing.dots, labels, heights, strict=True):
        middle = at + height / 2
        series = drawing.series.index(dot.series)
        for index, line in enumerate(lines):
            y = top + middle + 12 * (index - (len(lines) - 1) / 2)
            sheet.text(128, y, line, ha="right")
        seeds = [min(value, high) for value in dot.values if not math.isnan(value)]
        if len(dot.values) > 1:
            axes.plot(seeds, [middle] * len(seeds), "|", color=MUTED, markersize=7)
        told = f"{dot.label}, {dot.series}: {dot.shown}"
        if dot.interval is not None:
            ends = [min(max(end, low), high) for end in dot.interval]
            colour = marker(series)["markeredgecolor"]
            axes.plot(ends, [middle] * 2, "-", color=colour, linewidth=1.6, alpha=0.6)
            told += f" (95 %: {short(dot.interval[0])} to {short(dot.interval[1])})"
        mean = high if not math.isfinite(dot.mean) else min(dot.mean, high)
        how = marker(series, drawing.apart) | {"clip_on": False, "gid": sheet.tip(told)}
        if not math.isfinite(dot.mean):
            how |= {"marker": ">"}
        axes.plot([mean], [middle], linestyle="none", **how)
        sheet.text(WIDTH - 4, top + middle, dot.shown, ha="right")
        at += height
    return sheet


def _heat(drawing: Heat) -> Sheet:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    named: list[tuple[str, list[tuple[str, Any]]]] = []
    for heading, label, values in drawing.lines:
        if not named or named[-1][0] != heading:
            named.append((heading, []))
        named[-1][1].append((label, values))
    labels = [[broken(label) for label, _ in lines] for _, lines in named]
    heights = [[3 + 12 * len(words) for words in group] for group in labels]
    top, left, gap = 70.0, 136, 4
    full = sum(sum(group) + 18 for group in heights)
    sheet = Sheet(top + full + 22)
    width = (WIDTH - 4 - left - gap * (len(drawing.kinds) - 1)) / len(drawing.kinds)
    how: dict[str, Any] = {
        "cmap": colormaps["cividis"].resampled(_STEPS),
        "norm": Normalize(*drawing.bounds),
    }
    low, high = drawing.bounds
    scale = sheet.axes(left, 4, WIDTH - 12 - left, 10)
    edges = [low + (high - low) * at / _STEPS for at in range(_STEPS + 1)]
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    scale.pcolormesh(edges, [0, 1], [centres], clip_on=False, **how)
    scale.yaxis.set_visible(False)
    ticks(scale, "x", 5)
    sheet.text(120, 9, "SQNR, dB", ha="right", color=MUTED, size=SMALL)
    sheet.text(120, 22, "bright: less noise", ha="right", color=MUTED, size=SMALL)
    for at, kind in enumerate(drawing.kinds):
        middle = left + at * (width + gap) + width / 2
        sheet.text(middle, 50 if at % 2 else 62, kind, ha="center", size=SMALL)
    y = top
    for (heading, lines), words, tall in zip(named, labels, heights, strict=True):
        sheet.text(2, y + 9, heading, color=MUTED, size=SMALL)
        y += 18
        rows = [0.0]
        for each, height in zip(words, tall, strict=True):
            middle = y + rows[-1] + height / 2
            for index, line in enumerate(each):
                sheet.text(128, middle + 12 * (index - (len(each) - 1) / 2), line, ha="right")
            rows.append(rows[-1] + height)
        for at in range(len(drawing.kinds)):
            axes = sheet.axes(left + at * (width + gap), y, width, rows[-1])
            cells = [
                [math.nan if cell is None else min(max(cell, low), high) for cell in values[at]]
                for _, values in lines
            ]
            axes.pcolormesh(range(len(drawing.layers) + 1), rows, cells, clip_on=False, **how)
            axes.set_ylim(rows[-1], 0)
            axes.set_axis_off()
        y += rows[-1]
    first, last = drawing.layers[0], drawing.layers[-1]
    sheet.text(
        left, y + 11, f"in each: layers {first} to {last}, left to right", color=MUTED, size=SMALL
    )
    return sheet


def _scatter(drawing: Scatter) -> Sheet:
    used = {spot.series for spot in drawing.spots}
    best = front(drawing)
    top = 15 * len(used) + 12.0
    sheet = Sheet(top + 220 + 44 + 15 * (len(best) + 1) + 4)
    axes = sheet.axes(52, top, WIDTH - 66, 220)
    scale(axes, "x", (0, max(spot.x for spot in drawing.spots)), drawing.x_bend)
    losses = [0.0, *(spot.y for spot in drawing.spots)]
    scale(axes, "y", (min(losses), max(losses)), drawing.y_bend)
    axes.grid(linewidth=0.6)
    axes.axhline(0, color=INK, linewidth=1.2)
    axes.set_xlabel(_axis(drawing.x_axis, drawing.x_bend))
    axes.set_ylabel(_axis(drawing.y_axis, drawing.y_bend))
    sheet.legend(drawing.series, used)
    low, high = axes.get_ylim()
    places = [float(place) for place in axes.get_yticks() if low <= place <= high]
    axes.set_yticks(places, [short(place) if place else drawing.zero for place in places])
    for spot in drawing.spots:
        told = sheet.tip(f"{spot.label}, {spot.series}: {short(spot.x)}, {spot.y:+.2f} %")
        how = marker(drawing.series.index(spot.series)) | {"clip_on": False, "gid": told}
        axes.plot([spot.x], [spot.y], linestyle="none", alpha=0.85, **how)
    y = top + 220 + 44 + 9
    sheet.text(4, y, "Nothing else is both cheaper and better:", color=MUTED, size=SMALL)
    for at, spot in enumerate(best, 1):
        axes.annotate(
            str(at),
            (spot.x, spot.y),
            xytext=(6, -7),
            textcoords="offset points",
            va="center",
        )
        y += 15
        sheet.text(16, y, str(at), ha="right")
        sheet.mark(26, y, drawing.series.index(spot.series))
        sheet.text(36, y, f"{spot.label}: {short(spot.x)}, {spot.y:+.2f} %")
    return sheet


def front(drawing: Scatter) -> list[Spot]:
    """The spots that no other beats in both figures, cheapest first."""
    found: list[Spot] = []
    for spot in sorted(drawing.spots, key=lambda spot: (spot.x, spot.y, spot.label)):
        if not found or spot.y < found[-1].y:
            found.append(spot)
    return found


def _bars(drawing: Bars) -> Sheet:
    values = [value for _, bars in drawing.panels for _, value in bars]
    high = max(filter(math.isfinite, values), default=0.0)
    tall, step = 84, 84 + 36
    sheet = Sheet(step * len(drawing.panels) + 32)
    for at, (title, bars) in enumerate(drawing.panels):
        top = 26 + step * at
        axes = sheet.axes(52, top, WIDTH - 58, tall)
        last = at == len(drawing.panels) - 1
        for x, (layer, value) in enumerate(bars):
            told = f"{drawing.x_axis} {layer}: {value:.3g}"
            if not math.isfinite(value):
                axes.text(x, 0, f"{value}", rotation=90, ha="center", va="bottom", size=SMALL)
                continue
            axes.bar(x, value, width=0.8, color=SERIES[0], gid=sheet.tip(told))
        axes.set_xlim(-0.6, max(len(bars), 1) - 0.4)
        scale(axes, "y", (0, high or 1), None)
        every = next(size for size in _EVERY if 12 * size >= len(bars))
        axes.set_xticks(range(0, len(bars), every), [plain(name) for name, _ in bars[::every]])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y", linewidth=0.6)
        sheet.text(52, top - 9, title)
        if last:
            axes.set_xlabel(drawing.x_axis)
    sheet.text(
        9,
        26 + (step * len(drawing.panels) - 36) / 2,
        drawing.y_axis,
        rotation=90,
        ha="center",
        color=MUTED,
        size=SMALL,
    )
    return sheet


def _axis(name: str, bend: float | None) -> str:
    return name if bend is None else f"{name} (log beyond {short(bend)})"
