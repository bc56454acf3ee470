"""Records to pages: what a report says of each kind of record.

Lives here: one file a kind of record, with a function from the record to a `blocks.Page`, and the
table of them. Not here: how a page looks (`reports.html`, `reports.markdown`) and how a chart is
drawn (`reports.charts`).

To add a kind of record: (1) a file with its function; (2) a line in `_KINDS`: schema, reader, page;
(3) a test in tests/reports/pages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mxtorq.errors import UsageError
from mxtorq.export.manifest import SCHEMA as MANIFEST
from mxtorq.export.manifest import Manifest
from mxtorq.reading.documents import Refusal, parse_object
from mxtorq.reports import imbalance
from mxtorq.reports import markdown as plain
from mxtorq.reports.blocks import Page
from mxtorq.reports.inspection import SCHEMA as INSPECTION
from mxtorq.reports.inspection import Inspection
from mxtorq.reports.pages.checkpoint import checkpoint_page
from mxtorq.reports.pages.comparison import results_page
from mxtorq.reports.pages.inspection import inspection_page
from mxtorq.reports.published import Published
from mxtorq.reports.render import markdown as results_markdown
from mxtorq.reports.schema import SCHEMA as RESULTS
from mxtorq.reports.schema import Results

Record = Results | Manifest | Inspection


@dataclass(frozen=True, kw_only=True)
class _Kind:
    record: type[Any]
    read: Callable[[str, str], Any]
    """From its text and the name of its file."""
    page: Callable[[Any], Page]
    markdown: Callable[[Any], str] | None = None
    """Where a verb writes Markdown of its own; else it is that of the page."""


_KINDS = {
    RESULTS: _Kind(
        record=Results,
        read=lambda text, where: Results.from_json(text, f"a report of {where}"),
        page=results_page,
        markdown=results_markdown,
    ),
    MANIFEST: _Kind(record=Manifest, read=Manifest.from_json, page=checkpoint_page),
    INSPECTION: _Kind(
        record=Inspection,
        read=lambda text, where: Inspection.from_json(text, f"a report of {where}"),
        page=inspection_page,
        markdown=imbalance.markdown,
    ),
}


def read_record(text: str, where: str) -> Record:
    """The record that a JSON text is, of any kind that has a page.

    Raises:
        UsageError: of no such kind.
        MxtorqError: it is damaged or of another version.
    """
    refuse = Refusal(
        kind=UsageError,
        asked=f"a report of {where}",
        why=f"a report is drawn from a record: {' or '.join(_KINDS)}",
        todo="name a file that --json of compare, evaluate, inspect or quantize wrote, or a "
        "checkpoint",
    )
    schema = parse_object(text, refuse).get("schema")
    if not isinstance(schema, str) or schema not in _KINDS:
        raise refuse(f"schema {schema!r:.100}")
    record: Record = _KINDS[schema].read(text, where)
    return record


def page_of(record: Record, published: Published | None = None) -> Page:
    """What a report says of a record, and of published figures beside results."""
    if published is not None and isinstance(record, Results):
        return results_page(record, published)
    return _kind(record).page(record)


def markdown_of(record: Record) -> str:
    """The same in Markdown, without charts: their numbers stand in the tables."""
    kind = _kind(record)
    return kind.markdown(record) if kind.markdown else plain.markdown(kind.page(record))


def _kind(record: Record) -> _Kind:
    return next(kind for kind in _KINDS.values() if isinstance(record, kind.record))
