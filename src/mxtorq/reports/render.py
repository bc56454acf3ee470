"""Results as tables, for a terminal and for Markdown, from the record alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import stdev
from typing import Literal

from rich.markup import escape
from rich.table import Table

from mxtorq.reports.accuracies import accuracies_markdown
from mxtorq.reports.choices import choice_notes
from mxtorq.reports.fidelity import (
    FIDELITY_COLUMNS,
    NOTE,
    fidelity_table,
    interval_cell,
    marks,
)
from mxtorq.reports.schema import Results, Row, groups, sqnr_db

_COLUMNS = (
    "method",
    "outliers",
    "rounding",
    "scale rule",
    "perplexity",
    "vs BF16",
    "95 %",
    "vs best",
    "KL",
    "SQNR",
    "MACs",
    "bytes",
    "search s",
    "total s",
)
_MEANS = {
    "multiply_adds_per_token": ",.0f",
    "extra_bytes": ",.0f",
    "search_seconds": ".1f",
    "quantize_seconds": ".1f",
}
"""The last columns: means over seeds. A method that chooses has other transforms for each seed."""
_TEXT_COLUMNS = 4
_GIVEN_UP_FIRST = ("search s", "bytes", "total s", "MACs", "SQNR", "KL", "95 %", "vs best")
_TOLD = {
    "vs BF16": "vs BF16: of the perplexity.",
    "KL": "KL: from the BF16 model, mean of all predictions, in nats.",
    "SQNR": "SQNR: of the quantized linears' outputs, from the mean error of all sites.",
    "MACs": "MACs: what the transforms multiply online for a token.",
    "bytes": "bytes: what they store.",
    "search s": "search s: choosing the transforms; total s: with calibration and rounding.",
}
"""What a column holds, in the order in which that is told."""
_PARTS = {
    True: "OCP MXFP4",
    False: "Not OCP: scales that no hardware has, shown to explain published numbers",
}


def parts(results: Results) -> Iterator[tuple[str, Results]]:
    """The rows under OCP scales, and the others if there are any, each with the baselines."""
    for ocp, title in _PARTS.items():
        rows = tuple(row for row in results.rows if row.ocp is ocp and row.rounding is not None)
        if rows or ocp:
            used = (
                {row.outliers for row in rows} if rows else {row.outliers for row in results.rows}
            )
            bases = [r for r in results.rows if r.rounding is None and r.outliers in used]
            ordered = [
                row
                for outliers in dict.fromkeys(r.outliers for r in (*bases, *rows))
                for row in (*bases, *rows)
                if row.outliers == outliers
            ]
            yield title, replace(results, rows=tuple(ordered))


def cells(results: Results) -> list[list[str]]:
    """One list of strings a method (all its seeds), in the order of the columns.

    "vs BF16" is the perplexity over that of the baseline with the same outliers, minus one. With
    several seeds a figure is the mean and what stands after it the sample standard deviation.
    """
    baseline = {row.outliers: row for row in results.rows if row.rounding is None}
    lines = groups(results)
    return [
        _cells(group, baseline.get(group[0].outliers), word)
        for group, word in zip(lines, marks(lines), strict=True)
    ]


def markdown(results: Results) -> str:
    """The tables in Markdown, with the command that made them and what a reader must know."""
    rule = ["---"] * _TEXT_COLUMNS + ["---:"] * (len(_COLUMNS) - _TEXT_COLUMNS)
    pages = ["\n".join(f"    {line}" for line in results.command.splitlines())]
    used = _used(results)
    for title, part in parts(results):
        table = [[line[at] for at in used] for line in (_COLUMNS, rule, *cells(part))]
        pages += [f"**{title}**", _markdown_table(table)]
    pages += fidelity_tables(results)
    pages += site_tables(results)
    pages += accuracies_markdown(results)
    notes = footnote(results, [_COLUMNS[at] for at in used])
    pages += [*notes.splitlines(), _versions(results)]
    return "\n\n".join(pages) + "\n"


def columns() -> list[str]:
    """The headings over `cells`."""
    return list(_COLUMNS)


def fidelity_tables(results: Results) -> list[str]:
    """How far predictions and hidden states are from the baseline's, in Markdown."""
    rule = ["---"] * _TEXT_COLUMNS + ["---:"] * len(FIDELITY_COLUMNS)
    pages = []
    for title, header, lines in fidelity_cells(results):
        pages += [f"**{title}**", _markdown_table([header, rule, *lines])]
    return pages


def fidelity_terminal(results: Results) -> list[Table]:
    """The same for a terminal."""
    tables = []
    for title, header, lines in fidelity_cells(results):
        table = Table(title=escape(title), title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index < _TEXT_COLUMNS else "right")
        for line in lines:
            table.add_row(*map(escape, line))
        tables.append(table)
    return tables


def fidelity_cells(results: Results) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Of each part that was compared with a baseline: title, headings, and a line a method."""
    for title, part in parts(results):
        found = groups(part)
        heads = [_cells(group, None)[:_TEXT_COLUMNS] for group in found]
        if lines := fidelity_table(found, heads):
            header = [*_COLUMNS[:_TEXT_COLUMNS], *FIDELITY_COLUMNS]
            yield f"{title}: fidelity to BF16", header, lines


def site_tables(results: Results) -> list[str]:
    """`site_cells` of each part in Markdown: where a method loses what."""
    pages = []
    for title, part in parts(results):
        header, *lines = site_cells(part)
        rule = ["---"] * _TEXT_COLUMNS + ["---:"] * (len(header) - _TEXT_COLUMNS - 1) + ["---"]
        if lines:
            pages += [
                f"**{title}: SQNR of the mean error by kind of site**",
                _markdown_table([header, rule, *lines]),
            ]
    return pages


def site_cells(results: Results) -> list[list[str]]:
    """Headings, and a line a method: SQNR by kind of site, and the worst site of all."""
    known = [group for group in groups(results) if group[0].site_errors]
    kinds = dict.fromkeys(
        name.rpartition(".")[2] for group in known for name in group[0].site_errors
    )
    lines = [[*_COLUMNS[:_TEXT_COLUMNS], *kinds, "worst site"]]
    for group in known:
        errors = mean_site_errors(group)
        worst = max(errors, key=lambda name: errors[name])
        of_kind = [
            [error for name, error in errors.items() if name.rpartition(".")[2] == kind]
            for kind in kinds
        ]
        figures = [f"{sqnr_db(_mean(some)):.2f} dB" if some else "-" for some in of_kind]
        shown = f"{worst} ({sqnr_db(errors[worst]):.2f} dB)"
        lines.append([*_cells(group, None)[:_TEXT_COLUMNS], *figures, shown])
    return lines


def mean_site_errors(group: list[Row]) -> dict[str, float]:
    """The error of each site, the mean over the seeds that have it."""
    return {
        name: _mean([row.site_errors[name] for row in group if name in row.site_errors])
        for name in group[0].site_errors
    }


def _markdown_table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal(results: Results, title: str, width: int | None = None) -> Table:
    """The table for a terminal; a rule separates groups of different outliers and the part under
    scales outside of the format.

    Columns that do not fit into ``width`` characters are left out, and the caption says so: a
    figure that is cut is worse than one that is not there.
    """
    every = [line for _, part in parts(results) for line in cells(part)]
    used = _used(results)
    shown, dropped = _fitting(every, used, width)
    notes = [footnote(results, [_COLUMNS[at] for at in used])]
    if dropped:
        notes.append(f"Left out for want of width: {', '.join(dropped)}. --json has everything.")
    table = Table(
        title=title,
        title_justify="left",
        caption=escape("\n".join(notes)),
        caption_justify="left",
    )
    for index in shown:
        side: Literal["left", "right"] = "left" if index < _TEXT_COLUMNS else "right"
        table.add_column(_COLUMNS[index], justify=side, no_wrap=True)
    for at, (heading, part) in enumerate(parts(results)):
        if at:
            table.add_section()
            table.add_row(f"[italic]{heading.partition(':')[0]}[/italic]")
        lines = list(zip(groups(part), cells(part), strict=True))
        for index, (group, line) in enumerate(lines):
            following = [other for other, _ in lines[index + 1 : index + 2]]
            ends = bool(following) and following[0][0].outliers != group[0].outliers
            style = "bold" if group[0].rounding is None else None
            table.add_row(*(escape(line[i]) for i in shown), style=style, end_section=ends)
    return table


def _used(results: Results) -> list[int]:
    """All columns, but of a record of `evaluate` those that hold more than dashes.

    A comparison keeps them all: there a dash says that something was not measured.
    """
    every = list(range(len(_COLUMNS)))
    if not results.rows or not results.only_evaluated:
        return every
    lines = [line for _, part in parts(results) for line in cells(part)]
    return [at for at in every if any(line[at] != "-" for line in lines)]


def _fitting(
    lines: list[list[str]], used: list[int], width: int | None
) -> tuple[list[int], list[str]]:
    """Of the columns ``used`` those that fit, and the names of those that were given up, least
    telling first."""
    widths = [max(len(line[i]) for line in (list(_COLUMNS), *lines)) for i in range(len(_COLUMNS))]
    shown = list(used)
    dropped: list[str] = []
    for name in (name for name in _GIVEN_UP_FIRST if _COLUMNS.index(name) in used):
        if width is None or sum(widths[i] + 3 for i in shown) + 1 <= width:
            break
        shown.remove(_COLUMNS.index(name))
        dropped.append(name)
    return shown, dropped


def footnote(results: Results, shown: Sequence[str] = _COLUMNS) -> str:
    """What a reader must know to trust or to distrust the figures, of the columns ``shown``."""
    told = [text for name, text in _TOLD.items() if name in shown]
    notes = [" ".join([*told, "±: standard deviation over seeds."])] if told else []
    if any(row.activation_rule for row in results.rows):
        notes.append("Scale rule: of weights/activations where there are two.")
    compared = {"95 %", "vs best"} & {*shown}
    if compared and any(row.windows and row.rounding is not None for row in results.rows):
        notes.append(NOTE)
    for row in results.rows:
        evaluation, calibration = (
            row.provenance.get(k) or {} for k in ("evaluation", "calibration")
        )
        if evaluation:
            text = (
                f"Perplexity on {evaluation['source']!r}: {evaluation['tokens']:,} tokens, windows "
                f"of {evaluation['seqlen']}, baseline {row.provenance.get('baseline_dtype')}, "
                f"computed in {row.provenance.get('compute_dtype')}."
            )
            notes.append(text)
        if calibration:
            notes.append(
                f"Calibrated on {calibration['source']!r}: {calibration['tokens']:,} tokens, "
                f"{_seeds(results)}."
            )
            if calibration["text_sha256"] == evaluation.get("text_sha256"):
                notes.append("Calibrated on the evaluation text itself: optimistic figures.")
        if row.outliers:
            notes.append(
                f"Outliers {row.outliers!r}: channels of the same model rescaled exactly to that "
                "LLM's profile; the function is unchanged. Not a measurement of that LLM."
            )
        for site, width in (row.provenance.get("unfit") or {}).items():
            notes.append(f"{site} (width {width}) stays in BF16: no multiple of 32.")
    notes += choice_notes(results)
    return "\n".join(dict.fromkeys(notes))


def _seeds(results: Results) -> str:
    seeds = sorted({row.seed for row in results.rows if row.seed is not None})
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _cells(group: list[Row], baseline: Row | None, word: str = "-") -> list[str]:
    row = group[0]
    values = [each.perplexity for each in group]
    losses = (
        [] if baseline is None else [100 * (value / baseline.perplexity - 1) for value in values]
    )
    errors = [each.site_error for each in group if each.site_error]
    return [
        row.method if len(group) == 1 else f"{row.method} ({len(group)} seeds)",
        row.outliers or "none",
        row.rounding or "-",
        row.rules or "-",
        _spread(values, ".4f") if max(values) < 1e5 else f"{_mean(values):.3e}",
        "-" if row.rounding is None else _spread(losses, "+.2f", " %"),
        interval_cell(group, baseline),
        word,
        _spread(_known(group, "kl"), ".4f"),
        _spread([sqnr_db(error) for error in errors], ".2f", " dB"),
        *(_spread(_known(group, figure), form, "", 1) for figure, form in _MEANS.items()),
    ]


def _known(group: list[Row], figure: str) -> list[float]:
    values = [getattr(row, figure) for row in group]
    return [float(value) for value in values if value is not None]


def _spread(values: Sequence[float], form: str, unit: str = "", most: int = 2) -> str:
    """The mean, and with two or more values their standard deviation."""
    if not values:
        return "-"
    mean = f"{_mean(values):{form}}"
    if min(len(values), most) < 2:
        return f"{mean}{unit}"
    # A method can fail so badly that its perplexity overflows, which has no deviation.
    spread = stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{mean} ± {spread:{form.lstrip('+')}}{unit}"


def _mean(values: Sequence[float]) -> float:
    """Unlike `statistics.fmean`, of infinite and of huge values too."""
    return sum(values) / len(values)


def _versions(results: Results) -> str:
    return "Versions: " + ", ".join(f"{k} {v}" for k, v in results.versions.items()) + "."
