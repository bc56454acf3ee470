"""Results and manifests as tables, for a terminal and for Markdown, from the records alone."""

import json
import math
from typing import Literal

from rich.markup import escape
from rich.table import Table

from mxtorq.export.manifest import Manifest
from mxtorq.reports.schema import Results, Row

_COLUMNS = (
    "method",
    "outliers",
    "rounding",
    "scale rule",
    "perplexity",
    "vs BF16",
    "SQNR",
    "MACs",
    "seconds",
)
_TEXT_COLUMNS = 4


def cells(results: Results) -> list[list[str]]:
    """One list of strings a row, in the order of the columns.

    "vs BF16" is the perplexity over that of the baseline with the same outliers, minus one.
    """
    baseline = {row.outliers: row.perplexity for row in results.rows if row.rounding is None}
    return [_cells(row, baseline.get(row.outliers)) for row in results.rows]


def markdown(results: Results) -> str:
    """The table in Markdown, with the command that made it."""
    rule = ["---"] * _TEXT_COLUMNS + ["---:"] * (len(_COLUMNS) - _TEXT_COLUMNS)
    lines = [_COLUMNS, rule, *cells(results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"`{results.command}`\n\n{table}\n"


def terminal(results: Results, title: str) -> Table:
    """The table for a terminal; a rule separates groups of different outliers."""
    table = Table(
        title=title, title_justify="left", caption=footnote(results), caption_justify="left"
    )
    for index, column in enumerate(_COLUMNS):
        side: Literal["left", "right"] = "left" if index < _TEXT_COLUMNS else "right"
        table.add_column(column, justify=side, no_wrap=True)
    for index, (row, line) in enumerate(zip(results.rows, cells(results), strict=True)):
        following = results.rows[index + 1 : index + 2]
        ends = bool(following) and following[0].outliers != row.outliers
        table.add_row(*line, style="bold" if row.rounding is None else None, end_section=ends)
    return table


def footnote(results: Results) -> str:
    """What a reader must know to trust or to distrust the figures."""
    notes = [
        "vs BF16: of the perplexity. SQNR: of the quantized linears' outputs, from the mean error "
        "of all sites. MACs: what the transforms multiply online for a token. Seconds: to "
        "calibrate, fit and round."
    ]
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
                f"seed {calibration['seed']}."
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
    return "\n".join(dict.fromkeys(notes))


def _cells(row: Row, baseline: float | None) -> list[str]:
    return [
        row.method,
        row.outliers or "none",
        row.rounding or "-",
        row.scale_rule or "-",
        f"{row.perplexity:.4f}" if row.perplexity < 1e5 else f"{row.perplexity:.3e}",
        "-"
        if baseline is None or row.rounding is None
        else f"{row.perplexity / baseline - 1:+.2%}",
        "-" if not row.site_error else f"{sqnr_db(row.site_error):.2f} dB",
        "-" if row.multiply_adds_per_token is None else f"{row.multiply_adds_per_token:,}",
        "-" if row.quantize_seconds is None else f"{row.quantize_seconds:.1f}",
    ]


def sqnr_db(error: float) -> float:
    """Signal to quantization noise of a relative squared error, in decibels."""
    return math.inf if error == 0 else -10 * math.log10(error)


def checkpoint_facts(manifest: Manifest, name: str) -> Table:
    """What a checkpoint is, for a terminal."""
    source, calibration = manifest.source, manifest.calibration
    facts = {
        "checkpoint": name,
        "source": f"{source['model']} ({source['family']}), outliers: "
        f"{source['outliers'] or 'none'}",
        "method": f"{manifest.method} {json.dumps(manifest.options) if manifest.options else ''}",
        "rounding": manifest.rounding,
        "scale rule": ", ".join(f"{k} {v}" for k, v in manifest.scale_rules.items()),
        "calibration": f"{calibration['source']}: {calibration['tokens']:,} tokens in windows of "
        f"{calibration['seqlen']}, seed {calibration['seed']}",
        "site SQNR": f"{sqnr_db(manifest.mean_output_error):.2f} dB (of the mean error of "
        f"{len(manifest.sites)} sites)",
        "online cost": f"{manifest.multiply_adds_per_token:,} multiply-adds a token",
        "left in BF16": ", ".join(f"{k} (width {v})" for k, v in manifest.unfit.items()) or "-",
        "files": ", ".join(f"{k} {v['bytes'] / 1e6:.2f} MB" for k, v in manifest.files.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
    }
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(f"[bold]{key}[/bold]", escape(value))
    return table


def checkpoint_sites(manifest: Manifest) -> Table:
    """Every quantized site of a checkpoint, for a terminal."""
    table = Table()
    for column in ("site", "width", "linears", "transform", "MACs/token", "output error", "SQNR"):
        table.add_column(column, no_wrap=True)
    for entry in manifest.sites:
        table.add_row(
            entry.site,
            str(entry.width),
            str(len(entry.linears)),
            entry.kind,
            f"{entry.multiply_adds:,}",
            f"{entry.output_error:.3e}",
            f"{sqnr_db(entry.output_error):.2f} dB",
        )
    return table
