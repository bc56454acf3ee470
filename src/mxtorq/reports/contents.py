"""What a checkpoint is and holds, as tables for a terminal, from its manifest alone.

The page of a checkpoint (`pages.checkpoint`) says more; this is what `quantize` ends with and what
`mxtorq report FOLDER` prints without options.
"""

import json

from rich.markup import escape
from rich.table import Table

from mxtorq.export.manifest import Manifest
from mxtorq.reports.choices import brief, candidates_of
from mxtorq.reports.schema import sqnr_db


def checkpoint_facts(manifest: Manifest, name: str) -> Table:
    """What a checkpoint is, for a terminal."""
    source, calibration = manifest.source, manifest.calibration
    facts = {
        "checkpoint": name,
        "source": f"{source['model']} ({source['family']}), outliers: "
        f"{source['outliers'] or 'none'}",
        "method": f"{manifest.method} {json.dumps(manifest.recipe['method'])}",
        "rounding": f"{manifest.rounding} {json.dumps(manifest.recipe['rounding'])}",
        "scale rule": ", ".join(f"{k} {v}" for k, v in manifest.scale_rules.items()),
        "calibration": f"{calibration['source']}: {calibration['tokens']:,} tokens in windows of "
        f"{calibration['seqlen']}, seed {calibration['seed']}",
        "site SQNR": f"{sqnr_db(manifest.mean_output_error):.2f} dB (of the mean error of "
        f"{len(manifest.sites)} sites)",
        **_chosen(manifest),
        "online cost": f"{manifest.multiply_adds_per_token:,} multiply-adds a token; transforms of "
        f"{manifest.extra_bytes / 1e6:.3f} MB",
        **_experts(manifest),
        "left in BF16": ", ".join(f"{k} (width {v})" for k, v in manifest.unfit.items()) or "-",
        "files": ", ".join(f"{k} {v['bytes'] / 1e6:.2f} MB" for k, v in manifest.files.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
    }
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(f"[bold]{key}[/bold]", escape(value))
    return table


def _chosen(manifest: Manifest) -> dict[str, str]:
    chosen = candidates_of(manifest.sites)
    return {"chosen": brief(chosen)} if chosen else {}


def _experts(manifest: Manifest) -> dict[str, str]:
    shared = [entry.experts for entry in manifest.sites if entry.experts]
    if not shared:
        return {}
    total, pooled, unseen = (
        sum(counts[key] for counts in shared) for key in ("count", "pooled", "unseen")
    )
    return {
        "experts": f"{pooled:,} of {total:,} (over all sites) saw fewer tokens than their input is "
        f"wide, {unseen:,} none: calibrated on those of all experts"
    }


def checkpoint_sites(manifest: Manifest) -> Table:
    """Every quantized site of a checkpoint, for a terminal."""
    chosen = candidates_of(manifest.sites)
    table = Table()
    for column in ("site", "width", "linears", "transform", *(("chosen",) if chosen else ())):
        table.add_column(column, no_wrap=True)
    for column in ("MACs/token", "output error", "SQNR"):
        table.add_column(column, no_wrap=True)
    for entry in manifest.sites:
        table.add_row(
            escape(entry.site),
            str(entry.width),
            str(len(entry.linears)),
            escape(entry.kind),
            *((escape(chosen.get(entry.site, "-")),) if chosen else ()),
            f"{entry.multiply_adds:,}",
            f"{entry.output_error:.3e}",
            f"{sqnr_db(entry.output_error):.2f} dB",
        )
    return table
