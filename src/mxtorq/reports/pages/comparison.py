"""The page of a record of `compare` or `evaluate`: what was lost, where, and at what cost.

A figure is never without its scale rule: charts and tables name it in their headings. Rows under
scales that no hardware has stand apart. Methods that lose are shown as those that win, sorted by
what they lose.
"""

import json
from dataclasses import replace

from mxtorq.reports.against import against_cells, against_note
from mxtorq.reports.blocks import Block, Charts, Code, Facts, Fold, Grid, Note, Page, Section
from mxtorq.reports.pages.accuracies import accuracy_sections
from mxtorq.reports.pages.checkpoint import facts_of
from mxtorq.reports.pages.choices import results_choices
from mxtorq.reports.pages.comparison_charts import cost_charts, loss_charts, place_charts
from mxtorq.reports.pages.lines import (
    Line,
    is_direct,
    known,
    least,
    lines_of,
    profile_of,
    roundings,
    told,
)
from mxtorq.reports.pages.sites import site_chart
from mxtorq.reports.published import Published
from mxtorq.reports.render import (
    cells,
    columns,
    fidelity_cells,
    footnote,
    mean_site_errors,
    parts,
    site_cells,
)
from mxtorq.reports.schema import Results, groups


def results_page(results: Results, published: Published | None = None) -> Page:
    """The page of one record, and of published figures beside it if there are any."""
    lines = lines_of(results)
    models = dict.fromkeys(str(row.provenance.get("model", "a model")) for row in results.rows)
    compared = [line for line in lines if line.losses]
    sections = [Section(title="At a glance", blocks=_glance(results, lines))]
    if compared:
        sections.append(Section(title="Perplexity against BF16", blocks=loss_charts(compared)))
    sections.append(Section(title="All figures", blocks=_tables(results)))
    if published is not None:
        sections.append(
            Section(title="Beside published figures", blocks=_beside(results, published))
        )
    sections += accuracy_sections(results, lines)
    if any(line.first.site_errors for line in lines):
        sections.append(Section(title="Where it is lost", blocks=_places(results, lines)))
    sections += results_choices(results)
    if costs := cost_charts(compared):
        sections.append(Section(title="What it costs", blocks=costs))
    sections.append(Section(title="Recipes and provenance", blocks=_provenance(results, lines)))
    return Page(
        title=f"{', '.join(models)} in MXFP4 W4A4" if lines else f"{', '.join(models)} in BF16",
        lead=_lead(results, lines),
        sections=tuple(sections),
        record=results.to_json(),
        file="results.json",
    )


def _lead(results: Results, lines: list[Line]) -> str:
    if not lines:
        return f"Perplexity {results.rows[0].perplexity:.4f}." if results.rows else "No rows."
    if len(lines) == 1 and not lines[0].losses:
        row = lines[0].first
        return (
            f"{row.method}, rounded by {row.rounding}, scale rule {row.rules}: perplexity "
            f"{row.perplexity:.4f}. The record has no BF16 row to compare with."
        )
    methods = dict.fromkeys(line.first.method for line in lines)
    rules = ", ".join(dict.fromkeys(line.rule for line in lines))
    return (
        f"{len(results.rows)} rows: {_many(len(methods), 'method')}, "
        f"{_many(len(roundings(lines)), 'rounding')}, scale rules {rules}, each beside the same "
        "model in BF16."
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _glance(results: Results, lines: list[Line]) -> tuple[Block, ...]:
    pairs: list[tuple[str, str]] = []
    for row in results.rows:
        if row.rounding is None:
            pairs.append((f"{profile_of(row)}: BF16", f"perplexity {row.perplexity:.4f}"))
        strict = [
            line
            for line in lines
            if line.first.ocp and line.losses and line.first.outliers == row.outliers
        ]
        if row.rounding is None and strict:
            named = {"least loss": least(strict), "most loss": strict[0]}
            named["most loss"] = max(strict, key=lambda line: known(line.mean))
            direct = [line for line in strict if is_direct(line)]
            if direct:
                named["direct rounding"] = least(direct)
            pairs += [(f"{profile_of(row)}: {name}", told(line)) for name, line in named.items()]
    notes = tuple(Note(text) for text in footnote(results).splitlines()[1:])
    return (Facts(tuple(pairs)), *notes) if pairs else notes


def _tables(results: Results) -> tuple[Block, ...]:
    """A table a part and profile: what is in it has one baseline."""
    blocks: list[Block] = []
    for title, part in parts(results):
        for outliers in dict.fromkeys(row.outliers for row in part.rows):
            rows = tuple(row for row in part.rows if row.outliers == outliers)
            blocks.append(_table(title, replace(part, rows=rows)))
    blocks.append(Note(footnote(results).partition("\n")[0]))
    blocks += [
        Grid(title=title, columns=tuple(header), lines=tuple(map(tuple, lines)))
        for title, header, lines in fidelity_cells(results)
    ]
    return tuple(blocks)


def _table(title: str, results: Results) -> Grid:
    """With what a narrow screen shows first on the left."""
    lines = [
        {
            **dict(zip(columns(), line, strict=True)),
            "method": group[0].method,
            "seeds": str(len(group)) if group[0].rounding is not None else "-",
        }
        for group, line in zip(groups(results), cells(results), strict=True)
    ]
    first = ["method", "rounding", "scale rule", "vs BF16"]
    order = [*first, *(name for name in columns() if name not in (*first, "outliers")), "seeds"]
    rules = ", ".join(dict.fromkeys(row.rules for row in results.rows if row.rules))
    named = f" Scale rule{'s' if ',' in rules else ''}: {rules}." if rules else ""
    strong = (at for at, group in enumerate(groups(results)) if group[0].rounding is None)
    return Grid(
        title=f"{profile_of(results.rows[0])}. {title}.{named}",
        columns=tuple(order),
        lines=tuple(tuple(line[name] for name in order) for line in lines),
        strong=frozenset(strong),
    )


def _beside(results: Results, published: Published) -> tuple[Block, ...]:
    header, lines = against_cells(results, published)
    title = f"Our rows beside those of {published.where}"
    table = Grid(title=title, columns=tuple(header), lines=tuple(map(tuple, lines)))
    note = Note(against_note(results, published))
    return (note, table) if lines else (note,)


def _places(results: Results, lines: list[Line]) -> tuple[Block, ...]:
    with_sites = [line for line in lines if line.first.site_errors]
    blocks: list[Block] = [
        Note(
            "The output error of a site is sum ‖y − y_q‖² / sum ‖y‖² on calibration tokens, the "
            "mean of all seeds. SQNR, in decibels, is −10 log10 of it: more is better."
        )
    ]
    if len(with_sites) == 1:
        row = with_sites[0].first
        how = f"{row.method}, {row.rounding}, scale rule {row.rules}"
        blocks.append(
            Charts(
                title=profile_of(row),
                charts=(site_chart(mean_site_errors(with_sites[0].rows), how),),
            )
        )
    else:
        blocks += place_charts(with_sites)
    for title, part in parts(results):
        header, *figures = site_cells(part)
        if figures:
            table = Grid(
                title=f"{title}: SQNR of the mean error by kind of site",
                columns=tuple(header),
                lines=tuple(tuple(line) for line in figures),
            )
            blocks.append(Fold(title=table.title, blocks=(table,)))
    return tuple(blocks)


def _provenance(results: Results, lines: list[Line]) -> tuple[Block, ...]:
    found: dict[str, dict[str, None]] = {}
    for row in results.rows:
        for name, value in row.provenance.items():
            if name != "recipe":
                inner = value if isinstance(value, dict) else {"": value}
                for key, shown in facts_of(inner):
                    where = f"{name}.{key}".rstrip(".")
                    found.setdefault(where, {})[shown] = None
    blocks: list[Block] = [
        Facts(tuple((name, ", ".join(values)) for name, values in found.items())),
        Facts(tuple((f"version of {name}", of) for name, of in results.versions.items())),
    ]
    if results.command:
        blocks.append(Code(results.command))
    if lines:
        blocks.append(Fold(title="Options of every method", blocks=(_options(lines),)))
    blocks.append(
        Fold(title=f"All {len(results.rows)} rows, seed by seed", blocks=(_rows(results),))
    )
    return tuple(blocks)


def _options(lines: list[Line]) -> Grid:
    told: dict[tuple[str, ...], None] = {}
    for line in lines:
        recipe = line.first.provenance.get("recipe") or {}
        rounding = recipe.get("rounding", {}) if isinstance(recipe, dict) else {}
        options = (json.dumps(line.first.options), json.dumps(rounding))
        told[line.first.method, line.rounding, line.rule, *options] = None
    return Grid(
        title="Options, defaults too",
        columns=("method", "rounding", "scale rule", "options", "of the rounding"),
        lines=tuple(told),
    )


def _rows(results: Results) -> Grid:
    header = ("method", "outliers", "rounding", "scale rule", "seed", "perplexity", "nats", "KL")
    lines = [
        (
            row.method,
            row.outliers or "none",
            row.rounding or "-",
            row.rules or "-",
            "-" if row.seed is None else str(row.seed),
            f"{row.perplexity:.4f}",
            f"{row.nll:.5f}",
            "-" if row.kl is None else f"{row.kl:.5f}",
            f"{row.predictions:,}",
        )
        for row in results.rows
    ]
    return Grid(
        title="One line a seed; the scale rule stands in each",
        columns=(*header, "predictions"),
        lines=tuple(lines),
    )
