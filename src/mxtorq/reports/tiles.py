"""The chart that says which of a few names stands where: tiles by colour and by shape.

A line is as tall as its label and columns share the width, so that a deep model makes the chart
tall. A tile has the colour of its name, lightly, and in its middle the mark of the legend, since
there are more names than colours that everybody can tell apart.
"""

from mxtorq.reports.blocks import Tiles
from mxtorq.reports.sheet import MUTED, SERIES, SMALL, WIDTH, Sheet, broken, marker

_LEFT = 44
_LONG_LEFT = 136
_LEAST = 64
"""Units of a column whose headings need not take turns."""


def tiles(drawing: Tiles) -> Sheet:
    """The drawing on its sheet."""
    from matplotlib.patches import Rectangle

    labels = [broken(label) for label, _ in drawing.lines]
    left = _LEFT if all(len(label) <= 5 for label, _ in drawing.lines) else _LONG_LEFT
    edges = [0.0]
    for words in labels:
        edges.append(edges[-1] + 12 * len(words))
    legend = 15 * len(drawing.names)
    width = (WIDTH - 4 - left) / len(drawing.columns)
    heads = legend + (30 if width < _LEAST else 18)
    top = heads + 10
    sheet = Sheet(top + edges[-1] + 6)
    sheet.legend(drawing.names, {*drawing.names})
    sheet.text(left - 8, heads, drawing.axis, ha="right", color=MUTED, size=SMALL)
    for at, column in enumerate(drawing.columns):
        crowded = width < _LEAST
        y = heads - (12 if at % 2 and crowded else 0)
        x, side = left + (at + 0.5) * width, "center"
        if crowded and at == len(drawing.columns) - 1:
            x, side = WIDTH - 4, "right"  # a long word would leave the card
        sheet.text(x, y, column, ha=side, color=MUTED, size=SMALL)
    for words, start in zip(labels, edges, strict=False):
        for index, word in enumerate(words):
            sheet.text(left - 8, top + start + 6 + 12 * index, word, ha="right", size=SMALL)
    axes = sheet.axes(left, top, WIDTH - 4 - left, edges[-1])
    axes.set_xlim(0, len(drawing.columns))
    axes.set_ylim(edges[-1], 0)
    axes.set_axis_off()
    places: dict[str, list[tuple[float, float]]] = {name: [] for name in drawing.names}
    for at, (label, names) in enumerate(drawing.lines):
        low, high = edges[at], edges[at + 1]
        for place, name in enumerate(names):
            if not name:
                continue
            places[name].append((place + 0.5, (low + high) / 2))
            series = drawing.names.index(name)
            told = sheet.tip(f"{drawing.axis} {label}, {drawing.columns[place]}: {name}")
            tile = Rectangle(
                (place + 0.02, low + 0.5),
                0.96,
                high - low - 1,
                facecolor=SERIES[series % len(SERIES)],
                alpha=0.25,
                linewidth=0,
                zorder=3,  # over the marks, so that the whole tile can be pointed at
                gid=told,
            )
            axes.add_patch(tile)
    for series, spots in enumerate(places.values()):
        if spots:
            xs, ys = zip(*spots, strict=True)
            axes.plot(xs, ys, linestyle="none", clip_on=False, **marker(series))
    return sheet
