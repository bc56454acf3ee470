"""Our rows beside published ones: what may be compared, by how much it differs, and why it might.

A row of ours and a published one belong together when model, method, rounding and text are the
same; of a method the options are left out, since sources mention few. A difference is given only
under one scale rule. Rows that share all but the rule are shown without one, as "other rule", and
those whose rule nobody knows as "rule unknown": in this format the rule alone is worth more than
most methods (docs/results), so a difference across rules measures the rules.

"within" is said only where somebody has set a tolerance and the run was of that protocol: windows,
calibration, method's options and sites as published. Else it is "unknown", and "differs" says why.
What was published of the same models and not run is listed too, and what was run and nobody has
published: a comparison that picks its rows proves nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mxtorq.reports.published import UNKNOWN, Protocol, Published, PublishedRow
from mxtorq.reports.schema import Results, Row, groups

_COLUMNS = (
    *("model", "row of ours", "scale rule", "figure", "ours", "published", "difference", "within"),
    *("published as", "differs", "source"),
)
_FIGURES = range(4, 7)
BF16 = "bf16"
"""The method of rows of unquantized models."""
_NO_MODEL = "none of this model"
_WHOLE = {"wikitext2": 200_000}
"""Tokens that a text has at least: WikiText-2's test part has 245,569 words and marks, and the
vocabularies of these models join few of them."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of ours beside one published one, or one of them alone."""

    model: str
    ours: str
    rule: str
    figure: str
    value: float | None = None
    published: float | None = None
    difference: float | None = None
    """Ours less the published one; None under two rules."""
    within: str = ""
    """``yes``, ``no``, ``unknown``, ``other rule``, ``rule unknown``, or why there is no pair."""
    called: str = ""
    differs: str = ""
    source: str = ""


def lines_against(results: Results, published: Published) -> list[Line]:
    """Every row of ours beside what was published, then what was published and not run."""
    lines: list[Line] = []
    used: set[int] = set()
    models: dict[str, None] = {}
    for group in groups(results):
        name = str(group[0].provenance.get("model", ""))
        model = published.model_called(name)
        if model is None or group[0].outliers is not None:
            why = "channels were rescaled" if group[0].outliers else _NO_MODEL
            lines.append(_alone(name, group, why))
            continue
        models[model] = None
        bf16 = group[0].rounding is None
        found = list(
            _baselines(model, group, published) if bf16 else _pairs(model, group, published, used)
        )
        lines += found or [_alone(model, group, "none of this method, rounding and text")]
    for at, row in enumerate(published.rows):
        if row.model in models and at not in used:
            lines.append(_not_run(row, published.protocols[row.protocol]))
    return lines


def against_tables(results: Results, published: Published) -> list[Table | Text]:
    """The comparison for a terminal; a sentence where nothing was published of any model."""
    lines = against_cells(results, published)[1]
    if not lines:
        return [Text(against_note(results, published))]
    table = Table(
        title=f"Beside published figures ({escape(published.where)})",
        title_justify="left",
        caption=escape(against_note(results, published)),
        caption_justify="left",
    )
    for at, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if at in _FIGURES else "left", overflow="fold")
    for cells in lines:
        table.add_row(*map(escape, cells))
    return [table]


def against_markdown(results: Results, published: Published) -> str:
    """The comparison in Markdown."""
    rule = ["---:" if at in _FIGURES else "---" for at in range(len(_COLUMNS))]
    cells = [[_plain(cell) for cell in line] for line in against_cells(results, published)[1]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (list(_COLUMNS), rule, *cells))
    title = f"**Beside published figures ({_plain(published.where)})**"
    shown = [title, *([table] if cells else []), _plain(against_note(results, published))]
    return "\n\n".join(shown) + "\n"


def against_cells(results: Results, published: Published) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line a figure; none of models of which nothing was published."""
    lines = [line for line in lines_against(results, published) if line.differs != _NO_MODEL]
    return list(_COLUMNS), [_cells(line) for line in lines]


def against_note(results: Results, published: Published) -> str:
    """What a reader must know of the comparison, and of which models there is none."""
    lines = lines_against(results, published)
    unknown = list(dict.fromkeys(line.model for line in lines if line.differs == _NO_MODEL))
    names = ", ".join(map(repr, unknown))
    notes = [f"Nothing of {names} stands in {published.where}."] if unknown else []
    if any(line.differs != _NO_MODEL for line in lines):
        notes.append(
            "Difference: ours less the published figure, under the same scale rule only. Within: "
            "of a tolerance, where the published row has one and the run was of its protocol. "
            f"Published figures are those of {published.where}, whose top says what its keys mean."
        )
    return " ".join(notes)


def _baselines(model: str, group: list[Row], published: Published) -> Iterator[Line]:
    for baseline in published.baselines:
        if baseline.model != model:
            continue
        as_row = PublishedRow(
            model=model,
            protocol=baseline.protocol,
            called="BF16",
            scale_rule="-",
            method=BF16,
            perplexity=baseline.perplexity,
            accuracy=baseline.accuracy,
        )
        yield from _compared(group, as_row, published)


def _pairs(model: str, group: list[Row], published: Published, used: set[int]) -> Iterator[Line]:
    """The lines of rows that are one model, method and rounding; ``used`` gets their places."""
    names = group[0].method, str(group[0].rounding)
    method, rounding = (name.partition(":")[0] for name in names)
    for at, row in enumerate(published.rows):
        if (row.model, row.name) == (model, method) and row.rounding in (rounding, UNKNOWN):
            lines = list(_compared(group, row, published))
            used |= {at} if lines else set()
            yield from lines


def _compared(group: list[Row], row: PublishedRow, published: Published) -> Iterator[Line]:
    """A line for the perplexity and one for the accuracy, where both sides have it."""
    protocol, ours = published.protocols[row.protocol], group[0]
    evaluation = ours.provenance.get("evaluation") or {}
    text = str(evaluation.get("source", "")).partition(":")[0]
    in_the_run = list(_method_differs(ours, row, protocol))
    told = [] if row.method == BF16 else [*protocol.differs, *filter(None, [row.note])]
    if row.perplexity is not None and text == protocol.text:
        differs = [*_text_differs(evaluation, protocol), *in_the_run]
        value, figure = _mean([each.perplexity for each in group]), f"{text} perplexity"
        figures = value, row.perplexity, row.tolerance
        yield _line(group, row, figure, figures, differs, told, protocol.source)
    if row.accuracy is None or protocol.average is None:
        return
    asked = [each.averages[protocol.average] for each in group if protocol.average in each.averages]
    if asked:
        limit = (ours.provenance.get("tasks") or {}).get("limit")
        differs = [f"{limit} documents of each task here"] if limit is not None else []
        figures = 100 * _mean(asked), row.accuracy, None
        told = [*protocol.accuracy_differs, *told]
        figure = f"{protocol.average} in %"
        yield _line(group, row, figure, figures, [*differs, *in_the_run], told, protocol.source)


def _line(
    group: list[Row],
    row: PublishedRow,
    figure: str,
    figures: tuple[float, float, float | None],
    differs: list[str],
    told: list[str],
    source: str,
) -> Line:
    """A line of ours, the published figure and its tolerance.

    ``differs`` is what the run could have done otherwise; ``told`` is so in any run.
    """
    value, published, tolerance = figures
    rule = group[0].rules or "-"
    difference: float | None = value - published
    if row.scale_rule == UNKNOWN:
        difference, within = None, "rule unknown"
    elif row.scale_rule != rule:
        difference, within = None, "other rule"
        differs = [f"scale rule {row.scale_rule} there, {rule} here", *differs]
    elif tolerance is None or differs:
        within = UNKNOWN
    else:
        # Both figures are decimals: 8.26 is within 8.23 +- 0.03, whatever binary makes of it.
        inside = round(abs(value - published), 9) <= tolerance
        within = f"{'yes' if inside else 'no'} (±{tolerance:g})"
    return Line(
        model=row.model,
        ours=_label(group),
        rule=rule,
        figure=figure,
        value=value,
        published=published,
        difference=difference,
        within=within,
        called=row.called,
        differs="; ".join([*differs, *told]),
        source=source,
    )


def _method_differs(ours: Row, row: PublishedRow, protocol: Protocol) -> Iterator[str]:
    if row.method == BF16:
        return
    for key, there in row.options.items():
        here = ours.options.get(key)
        if here is None or str(here) != there:
            yield f"{key} {there} there, {UNKNOWN if here is None else here} here"
    if row.rounding == UNKNOWN:
        yield "rounding unknown there"
    if ours.provenance.get("unfit"):
        yield "some sites stay in BF16 here"
    calibration = ours.provenance.get("calibration") or {}
    if (row.name, row.rounding) == ("identity", "rtn") or not calibration:
        return  # which is fitted to no text
    text = str(calibration["source"]).partition(":")[0]
    if protocol.calibration is None:
        yield "calibration unknown there"
    elif text != protocol.calibration:
        yield f"calibrated on {protocol.calibration} there, {text} here"
    tokens = calibration["tokens"]
    if protocol.calibration_tokens not in (None, tokens):
        yield f"{protocol.calibration_tokens:,} calibration tokens there, {tokens:,} here"


def _text_differs(evaluation: dict[str, object], protocol: Protocol) -> Iterator[str]:
    seqlen, tokens = evaluation["seqlen"], evaluation["tokens"]
    if protocol.seqlen != seqlen:
        there = UNKNOWN if protocol.seqlen is None else protocol.seqlen
        yield f"windows of {there} there, {seqlen} here"
    if isinstance(tokens, int) and tokens < _WHOLE.get(protocol.text or "", 0):
        yield f"the first {tokens:,} tokens of the text here"


def _alone(model: str, group: list[Row], why: str) -> Line:
    return Line(
        model=model,
        ours=_label(group),
        rule=group[0].rules or "-",
        figure="perplexity",
        value=_mean([row.perplexity for row in group]),
        within="no published row",
        differs=why,
    )


def _not_run(row: PublishedRow, protocol: Protocol) -> Line:
    told = row.perplexity is not None
    figure = f"{protocol.text} perplexity" if told else f"{protocol.average or 'accuracy'} in %"
    return Line(
        model=row.model,
        ours="-",
        rule=row.scale_rule,
        figure=figure,
        published=row.perplexity if told else row.accuracy,
        within="published, not run here",
        called=row.called,
        differs="mxtorq has no such method" if row.method is None else "",
        source=protocol.source,
    )


def _label(group: list[Row]) -> str:
    row = group[0]
    name = " ".join(filter(None, (row.method, row.rounding)))
    return name if len(group) == 1 else f"{name} ({len(group)} seeds)"


def _cells(line: Line) -> list[str]:
    digits = 2 if line.figure.endswith("%") else 3
    figures = [
        "-" if line.value is None else f"{line.value:.{digits}f}",
        "-" if line.published is None else f"{line.published:.{digits}f}",
        "-" if line.difference is None else f"{line.difference:+.{digits}f}",
    ]
    told = [each or "-" for each in (line.within, line.called, line.differs, line.source)]
    return [line.model, line.ours, line.rule, line.figure, *figures, *told]


def _plain(text: str) -> str:
    """A text in which nothing is Markdown or HTML."""
    return "".join(f"\\{letter}" if letter in r"\`*[]<|" else letter for letter in text)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
