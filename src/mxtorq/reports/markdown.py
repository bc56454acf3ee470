"""A page in Markdown: its text and tables; the numbers of its charts stand in the tables."""

from collections.abc import Iterator

from mxtorq.reports.blocks import Block, Charts, Code, Facts, Fold, Grid, Note, Page, numeric


def markdown(page: Page) -> str:
    """All of a page but its drawings."""
    texts = [f"# {_escaped(page.title)}", _escaped(page.lead)]
    for section in page.sections:
        texts.append(f"## {_escaped(section.title)}")
        texts += [text for block in section.blocks for text in _texts(block)]
    text = "\n\n".join(texts) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")  # file names may hold half a surrogate


def _texts(block: Block) -> Iterator[str]:
    if isinstance(block, Note):
        yield _escaped(block.text)
    elif isinstance(block, Facts):
        yield "\n".join(f"- **{_escaped(name)}**: {_escaped(what)}" for name, what in block.pairs)
    elif isinstance(block, Code):
        yield "\n".join(f"    {line}" for line in block.text.splitlines())
    elif isinstance(block, Grid):
        yield f"**{_escaped(block.title)}**"
        yield _table(block)
    elif isinstance(block, Fold):
        for each in block.blocks:
            yield from _texts(each)
    else:
        assert isinstance(block, Charts)
        yield f"**{_escaped(block.title)}**"
        yield from (
            f"*{_escaped(chart.title)}*: {_escaped(chart.description)}" for chart in block.charts
        )


def _table(grid: Grid) -> str:
    sides = [numeric(grid.lines, at) for at in range(len(grid.columns))]
    rule = ["---:" if right else "---" for right in sides]
    lines = [[_escaped(cell) for cell in line] for line in (grid.columns, *grid.lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _escaped(text: str) -> str:
    """A text in which nothing is Markdown or HTML."""
    escaped = "".join(f"\\{letter}" if letter in r"\`*[]<|" else letter for letter in text)
    return " ".join(escaped.split())
