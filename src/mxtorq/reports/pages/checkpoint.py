"""The page of a checkpoint, from its manifest: what it is, what was chosen, what each site lost.

Every figure of this page is an error on calibration tokens; what a model loses on text is measured
by `mxtorq evaluate`, and the page says so.
"""

import json
from collections.abc import Mapping
from typing import Any

from mxtorq.export.manifest import FILE, Manifest, SiteEntry
from mxtorq.reports.blocks import Block, Charts, Facts, Fold, Grid, Note, Page, Section
from mxtorq.reports.pages.choices import manifest_choices
from mxtorq.reports.pages.sites import by_kind, site_chart
from mxtorq.reports.schema import sqnr_db


def checkpoint_page(manifest: Manifest) -> Page:
    """The page of one checkpoint."""
    rules = " and ".join(dict.fromkeys(manifest.scale_rules.values()))
    if len(set(manifest.scale_rules.values())) > 1:
        rules = ", ".join(f"{rule} ({part})" for part, rule in manifest.scale_rules.items())
    source = manifest.source
    return Page(
        title=f"{source['model']} in MXFP4 W4A4",
        lead=f"{manifest.method}, rounded by {manifest.rounding}, scale rule {rules}. Site SQNR "
        f"{sqnr_db(manifest.mean_output_error):.2f} dB, of the mean error of "
        f"{len(manifest.sites)} sites.",
        sections=(
            Section(title="What it is", blocks=_what(manifest, rules)),
            *manifest_choices(manifest),
            Section(title="What each site lost", blocks=_sites(manifest, rules)),
            Section(title="Recipe", blocks=(Facts(facts_of(manifest.recipe)),)),
            Section(title="Provenance", blocks=_provenance(manifest)),
        ),
        record=manifest.to_json(),
        file=FILE,
    )


def _what(manifest: Manifest, rules: str) -> tuple[Block, ...]:
    source, calibration = manifest.source, manifest.calibration
    pairs = [
        ("source", f"{source['model']} ({source['family']})"),
        ("outliers", source["outliers"] or "none: the model as it is"),
        ("method", manifest.method),
        ("rounding", manifest.rounding),
        ("scale rule", f"{rules} of {' and '.join(manifest.scale_rules)}"),
        (
            "calibration",
            f"{calibration['source']}: {calibration['tokens']:,} tokens in windows of "
            f"{calibration['seqlen']}, seed {calibration['seed']}",
        ),
        ("online cost", f"{manifest.multiply_adds_per_token:,} multiply-adds a token"),
        ("stored transforms", f"{manifest.extra_bytes:,} bytes"),
        ("in MXFP4", f"{sum(len(s.linears) for s in manifest.sites):,} linears"),
        (
            "left in BF16",
            ", ".join(f"{k} (width {v}: no multiple of 32)" for k, v in manifest.unfit.items())
            or "no site",
        ),
    ]
    return (Facts(tuple(pairs)),)


def _sites(manifest: Manifest, rules: str) -> tuple[Block, ...]:
    if not manifest.sites:
        return (Note("No site was quantized."),)
    errors = {entry.site: entry.output_error for entry in manifest.sites}
    return (
        Note(
            "Output error: sum ‖y − y_q‖² / sum ‖y‖² of the linears of a site on calibration "
            "tokens, weights and activations in MXFP4 against BF16 on the same inputs. It says "
            "where precision goes, not what the model loses on text, which "
            "mxtorq evaluate measures."
        ),
        Charts(title="Layer by layer", charts=(site_chart(errors, f"scale rule {rules}"),)),
        Grid(
            title=f"By kind of site, scale rule {rules}",
            columns=("kind", "sites", "mean error", "SQNR", "worst error", "worst layer"),
            lines=tuple(_kind(kind, layers) for kind, layers in by_kind(errors).items()),
        ),
        Fold(title=f"All {len(manifest.sites)} sites", blocks=(_all(manifest, rules),)),
    )


def _kind(kind: str, layers: Mapping[str, float]) -> tuple[str, ...]:
    mean = sum(layers.values()) / len(layers)
    worst = max(layers, key=lambda layer: layers[layer])
    figures = (f"{mean:.3e}", f"{sqnr_db(mean):.2f} dB", f"{layers[worst]:.3e}", worst)
    return (kind, str(len(layers)), *figures)


def _all(manifest: Manifest, rules: str) -> Grid:
    experts = any(entry.experts for entry in manifest.sites)
    columns = ("site", "width", "linears", "transform", "MACs/token", "bytes", "error", "SQNR")
    return Grid(
        title=f"Every site, scale rule {rules}",
        columns=(*columns, *(("experts", "pooled", "unseen") if experts else ())),
        lines=tuple(_site(entry, experts) for entry in manifest.sites),
    )


def _site(entry: SiteEntry, experts: bool) -> tuple[str, ...]:
    counts = entry.experts or {}
    of_experts = tuple(str(counts.get(key, "-")) for key in ("count", "pooled", "unseen"))
    return (
        entry.site,
        str(entry.width),
        str(len(entry.linears)),
        entry.kind,
        f"{entry.multiply_adds:,}",
        f"{entry.extra_bytes:,}",
        f"{entry.output_error:.3e}",
        f"{sqnr_db(entry.output_error):.2f} dB",
        *(of_experts if experts else ()),
    )


def _provenance(manifest: Manifest) -> tuple[Block, ...]:
    files = tuple(
        (name, f"{facts['bytes']:,}", facts["sha256"]) for name, facts in manifest.files.items()
    )
    return (
        Facts(
            (
                *facts_of(manifest.source, "source."),
                *facts_of(manifest.calibration, "calibration."),
                ("seed", str(manifest.seed)),
            )
        ),
        Grid(title="Files", columns=("file", "bytes", "SHA-256"), lines=files),
        Facts(tuple((f"version of {name}", of) for name, of in manifest.versions.items())),
    )


def facts_of(values: Mapping[str, Any], before: str = "") -> tuple[tuple[str, str], ...]:
    """A table of choices as lines, those of inner tables with their names before them."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            pairs += facts_of(value, f"{before}{name}.")
        else:
            pairs.append((f"{before}{name}", _shown(value)))
    return tuple(pairs)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
