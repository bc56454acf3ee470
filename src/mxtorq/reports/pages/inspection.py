"""The page of an inspection: what MXFP4 sees of a model, before and after each transform.

The tables are those of the terminal and of Markdown (`reports.imbalance`); the charts show what
the figures sum up: block variances and codes of the worst site of each kind, and the error site by
site.
"""

from itertools import pairwise

from mxtorq.reports.blocks import (
    Bars,
    Block,
    Chart,
    Charts,
    Code,
    Facts,
    Fold,
    Grid,
    Heat,
    Note,
    Page,
    Section,
)
from mxtorq.reports.imbalance import Sheet, every_site, sheets
from mxtorq.reports.inspection import Inspection, Picture, SiteRecord
from mxtorq.reports.pages.checkpoint import facts_of
from mxtorq.reports.pages.sites import by_kind, decibels
from mxtorq.reports.schema import sqnr_db

_BLOCKS = 64
"""Bars of block variances, at most: each is the highest of its neighbours."""
_CODEWORDS = ("-6", "-4", "-3", "-2", "-1.5", "-1", "-.5", "0")
_NAMES = (*_CODEWORDS, ".5", "1", "1.5", "2", "3", "4", "6")


def inspection_page(inspection: Inspection) -> Page:
    """The page of one inspection."""
    rule = inspection.scale_rule
    tables = [_blocks(sheet) for sheet in sheets(inspection, None)]
    return Page(
        title=f"What MXFP4 sees of {inspection.model}",
        lead=f"Inputs and weights of {len(inspection.sites)} sites under "
        f"{', '.join(inspection.methods)}, rounded to nearest, scale rule {rule}.",
        sections=(
            Section(title="Pictures", blocks=_pictures(inspection)),
            Section(title="Figures", blocks=tuple(block for some in tables for block in some)),
            Section(title="Every site", blocks=_all(inspection)),
            Section(title="Provenance", blocks=_provenance(inspection)),
        ),
        record=inspection.to_json(),
        file="inspection.json",
    )


def _blocks(sheet: Sheet) -> tuple[Block, ...]:
    grid = Grid(
        title=sheet.title,
        columns=sheet.columns,
        lines=tuple(tuple(line) for line in sheet.lines),
    )
    return (grid, *map(Note, sheet.notes))


def _all(inspection: Inspection) -> tuple[Block, ...]:
    return tuple(Fold(title=sheet.title, blocks=_blocks(sheet)) for sheet in every_site(inspection))


def _pictures(inspection: Inspection) -> tuple[Block, ...]:
    kinds: dict[str, list[SiteRecord]] = {}
    for site in inspection.sites:
        kinds.setdefault(site.kind, []).append(site)
    worst = [
        max(sites, key=lambda site: site.methods[inspection.methods[0]].inputs.max_over_mean)
        for sites in kinds.values()
    ]
    rule = f"scale rule {inspection.scale_rule}"
    return (
        Charts(
            title="How loud the blocks of 32 inputs are, at the most uneven site of each kind",
            charts=tuple(_variances(site, inspection.methods) for site in worst),
        ),
        Charts(
            title=f"How often each value of E2M1 is used there, {rule}",
            charts=tuple(_codes(site, inspection.methods) for site in worst),
        ),
        Charts(
            title=f"Which scales the blocks have there, {rule}",
            charts=tuple(_scales(site, inspection.methods) for site in worst),
        ),
        Charts(title=f"SQNR of rounding, {rule}", charts=_errors(inspection)),
    )


def _variances(site: SiteRecord, methods: list[str]) -> Chart:
    spread = ", ".join(
        f"{method} {site.methods[method].inputs.max_over_mean:.2f}" for method in methods
    )
    return Chart(
        title=site.site,
        description="Bars from zero, a panel for each transform and a bar for each block (or the "
        f"loudest of some neighbours): its mean square over that of all blocks. Largest: {spread}.",
        drawing=Bars(
            panels=tuple((name, _over_mean(site.methods[name].inputs)) for name in methods),
            x_axis="block",
            y_axis="mean square over the mean of all",
        ),
    )


def _over_mean(picture: Picture) -> tuple[tuple[str, float], ...]:
    values = picture.block_variances
    mean = sum(values) / len(values) or 1.0
    count = min(_BLOCKS, len(values))
    edges = [len(values) * at // count for at in range(count + 1)]
    return tuple((str(start), max(values[start:stop]) / mean) for start, stop in pairwise(edges))


def _codes(site: SiteRecord, methods: list[str]) -> Chart:
    pictures = {name: site.methods[name].inputs for name in methods}
    told = ", ".join(f"{name} {picture.entropy:.2f} bits" for name, picture in pictures.items())
    return Chart(
        title=site.site,
        description="Bars from zero, a panel for each transform and a bar for each of the 15 "
        f"values: the share of codes. Entropy: {told}; at most 3.91.",
        drawing=Bars(
            panels=tuple(
                (
                    f"{name}: {picture.entropy:.2f} bits",
                    tuple(
                        (value, count / picture.elements)
                        for value, count in zip(_NAMES, picture.codeword_counts, strict=True)
                    ),
                )
                for name, picture in pictures.items()
            ),
            x_axis="value",
            y_axis="share of codes",
        ),
    )


def _scales(site: SiteRecord, methods: list[str]) -> Chart:
    pictures = {name: site.methods[name].inputs for name in methods}
    exponents = [int(each) for picture in pictures.values() for each in picture.scale_exponents]
    span = range(min(exponents), max(exponents) + 1)
    return Chart(
        title=site.site,
        description="Bars from zero, a panel for each transform and a bar for each power of two "
        f"from 2^{span[0]} to 2^{span[-1]}: the share of blocks with that scale.",
        drawing=Bars(
            panels=tuple((name, _shares(picture, span)) for name, picture in pictures.items()),
            x_axis="exponent of the scale",
            y_axis="share of blocks",
        ),
    )


def _shares(picture: Picture, span: range) -> tuple[tuple[str, float], ...]:
    blocks = sum(picture.scale_exponents.values())
    return tuple((str(each), picture.scale_exponents.get(str(each), 0) / blocks) for each in span)


def _errors(inspection: Inspection) -> tuple[Chart, ...]:
    parts = {
        part: {
            name: by_kind(
                {
                    site.site: getattr(site.methods[name], part).relative_error
                    for site in inspection.sites
                }
            )
            for name in inspection.methods
        }
        for part in ("inputs", "weights")
    }
    every = [
        error
        for tables in parts.values()
        for kinds in tables.values()
        for layers in kinds.values()
        for error in layers.values()
    ]
    return tuple(_heat(part, tables, decibels(every)) for part, tables in parts.items())


def _heat(
    part: str, tables: dict[str, dict[str, dict[str, float]]], bounds: tuple[float, float]
) -> Chart:
    first = next(iter(tables.values()))
    kinds = tuple(first)
    layers = tuple(dict.fromkeys(layer for of in first.values() for layer in of))
    lines = tuple(
        (
            "rounded to nearest",
            method,
            tuple(
                tuple(
                    sqnr_db(table[kind][layer]) if layer in table[kind] else None
                    for layer in layers
                )
                for kind in kinds
            ),
        )
        for method, table in tables.items()
    )
    return Chart(
        title=part,
        description=f"Heat map of {len(tables)} transforms over {len(kinds)} kinds of site and "
        f"{len(layers)} layers: signal to noise of rounding the {part}, in decibels.",
        drawing=Heat(lines=lines, kinds=kinds, layers=layers, bounds=bounds),
    )


def _provenance(inspection: Inspection) -> tuple[Block, ...]:
    texts = facts_of(inspection.calibration, "calibration.")
    if inspection.evaluation:
        texts += facts_of(inspection.evaluation, "evaluation.")
    chosen = (
        ("family", inspection.family),
        ("outliers", inspection.outliers or "none: the model as it is"),
        ("seed", str(inspection.seed)),
    )
    versions = tuple((f"version of {name}", of) for name, of in inspection.versions.items())
    return (Facts((*chosen, *texts)), Facts(versions), Code(inspection.command))
