"""A page as one HTML file: style, script, charts and the record itself are in it.

A content security policy forbids the network and every script but the one whose hash it names, so
that a report from a stranger can be opened: nothing is fetched, and whatever a record says is
escaped and stays text. The
page reads without its script, which sorts tables, switches between light and dark, and saves the
record. The same record gives the same bytes.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from itertools import count

from mxtorq.reports.blocks import (
    Block,
    Charts,
    Code,
    Facts,
    Fold,
    Grid,
    Note,
    Page,
    Section,
    number,
    numeric,
)
from mxtorq.reports.charts import svg
from mxtorq.reports.pages import Record, page_of
from mxtorq.reports.published import Published

_SHORT = 24
"""Characters of a name that stands on one line: of methods, profiles, kinds of site."""


def page(record: Record, published: Published | None = None) -> str:
    """The report of a record, as the text of an HTML file.

    ``published`` are figures to set results beside; the page holds the record alone.

    Raises:
        UsageError: the plotting library is not there.
    """
    return document(page_of(record, published))


def document(page: Page) -> str:
    """The HTML of a page. Raises as `page`."""
    folder = files("mxtorq.reports")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = folder.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    names = count(1)
    sections = [_section(section, at, names) for at, section in enumerate(page.sections, 1)]
    links = "".join(
        f'<a href="#section-{at}">{escape(section.title)}</a>'
        for at, section in enumerate(page.sections, 1)
    )
    # "<" stands in strings of JSON only, where \u003c is the same letter.
    record = page.record.replace("<", "\\u003c")
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(page.title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<button type="button" id="theme" hidden>Light or dark</button>
<h1>{escape(page.title)}</h1>
<p class="lead">{escape(page.lead)}</p>
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{"".join(sections)}<section id="record-section">
<h2>The record</h2>
<p>This page was drawn from a JSON record, which it holds;
<code>mxtorq report</code> draws it again.
<button type="button" id="save" data-file="{escape(page.file)}" hidden>Save the record</button></p>
<script type="application/json" id="record">{record}</script>
</section>
</main>
<script>{script}</script>
</body>
</html>
"""
    return text.encode("utf-8", "replace").decode("utf-8")  # file names may hold half a surrogate


def _section(section: Section, at: int, names: Iterator[int]) -> str:
    inner = "".join(_block(block, names) for block in section.blocks)
    return f'<section id="section-{at}">\n<h2>{escape(section.title)}</h2>\n{inner}</section>\n'


def _block(block: Block, names: Iterator[int]) -> str:
    if isinstance(block, Note):
        return f'<p class="note">{escape(block.text)}</p>\n'
    if isinstance(block, Code):
        return f'<pre tabindex="0"><code>{escape(block.text)}</code></pre>\n'
    if isinstance(block, Facts):
        pairs = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(what)}</dd></div>"
            for name, what in block.pairs
        )
        return f"<dl>{pairs}</dl>\n"
    if isinstance(block, Grid):
        return _grid(block)
    if isinstance(block, Charts):
        drawn = "".join(
            f"<figure><figcaption>{escape(chart.title)}</figcaption>"
            f"{svg(chart, f'chart-{next(names)}')}</figure>\n"
            for chart in block.charts
        )
        return f'<h3>{escape(block.title)}</h3>\n<div class="charts">{drawn}</div>\n'
    assert isinstance(block, Fold)
    inner = "".join(_block(each, names) for each in block.blocks)
    return f"<details><summary>{escape(block.title)}</summary>\n{inner}</details>\n"


def _grid(grid: Grid) -> str:
    right = [numeric(grid.lines, at) for at in range(len(grid.columns))]
    heads = "".join(
        f'<th scope="col"{_side(is_number)}>{escape(name)}</th>'
        for name, is_number in zip(grid.columns, right, strict=True)
    )
    lines = "".join(
        f"<tr{' class=strong' if at in grid.strong else ''}>{_line(line, right)}</tr>\n"
        for at, line in enumerate(grid.lines)
    )
    title = escape(grid.title)
    return (
        f'<h3>{title}</h3>\n<div class="table" tabindex="0" role="region" aria-label="{title}">'
        f"<table>\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{lines}</tbody></table></div>\n"
    )


def _line(line: tuple[str, ...], right: list[bool]) -> str:
    first, *others = line
    cells = [f'<th scope="row">{_breakable(first)}</th>']
    for text, is_number in zip(others, right[1:], strict=True):
        value = number(text) if is_number else None
        sort = "" if value is None else f' data-value="{escape(json.dumps(value))}"'
        cells.append(
            f"<td{_side(is_number)}{sort}>{escape(text) if is_number else _breakable(text)}</td>"
        )
    return "".join(cells)


def _breakable(text: str) -> str:
    """A long name, which a narrow column may break where an option or a layer begins.

    A short one stays whole: ``down_in`` on two lines saves no width that anything needs.
    """
    return escape(text) if len(text) <= _SHORT else re.sub(r"([:=_./])", r"\1<wbr>", escape(text))


def _side(is_number: bool) -> str:
    return ' class="number"' if is_number else ""
