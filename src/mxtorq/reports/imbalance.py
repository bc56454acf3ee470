"""An inspection as tables, for a terminal and for Markdown, from the record alone.

Small pictures stand in the cells: a bar for each block's variance or for each magnitude of E2M1,
its height the share of the highest one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal

from rich.markup import escape
from rich.table import Table

from mxtorq.reports.inspection import Inspection, Pair, Picture, SiteRecord
from mxtorq.reports.schema import sqnr_db

_BARS = "▁▂▃▄▅▆▇█"
_BLOCKS = 24
"""Bars of block variances, at most: each is the highest of its neighbours."""
_SHOWN = 10
"""Lines of a list in a terminal."""
_MASSIVE = 3.0
"""Times the median from which a row counts as long."""

Part = Callable[[Pair], Picture]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table before it has a form."""

    title: str
    columns: tuple[str, ...]
    texts: int
    """How many columns from the left hold text."""
    lines: list[list[str]]
    notes: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    """Columns that a narrow terminal gives up, in this order."""
    grouped: bool = False
    """A rule stands where the first column changes."""


def terminal(inspection: Inspection, width: int | None = None) -> list[Table]:
    """The tables for a terminal of that many columns."""
    return [_table(sheet, width) for sheet in sheets(inspection, _SHOWN)]


def markdown(inspection: Inspection) -> str:
    """All tables in Markdown, each site for itself too, with the command behind them."""
    pages = ["\n".join(f"    {line}" for line in inspection.command.splitlines())]
    for sheet in (*sheets(inspection, None), *every_site(inspection)):
        sides = ["---"] * sheet.texts + ["---:"] * (len(sheet.columns) - sheet.texts)
        table = [list(sheet.columns), sides, *sheet.lines]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in table]
        pages += [f"**{sheet.title}**", "\n".join(f"| {' | '.join(line)} |" for line in escaped)]
        pages += sheet.notes
    pages.append("Versions: " + ", ".join(f"{k} {v}" for k, v in inspection.versions.items()) + ".")
    return "\n\n".join(page for page in pages if page) + "\n"


def sheets(inspection: Inspection, most: int | None) -> Iterator[Sheet]:
    """The tables in their order; lists are cut after ``most`` lines."""
    yield _imbalances(inspection, "What MXFP4 sees of the inputs", lambda pair: pair.inputs, True)
    yield _imbalances(inspection, "And of the weights", lambda pair: pair.weights, False)
    if len(inspection.methods) > 1:
        yield _verdict(inspection)
    yield _channels(inspection, most)
    yield _tokens(inspection, most)
    if inspection.harm:
        yield _harm(inspection, most)


_FIGURES = (
    "loudest / mean",
    "/ median",
    "entropy",
    "zero",
    "cut",
    "SQNR",
    "magnitudes 0 to 6",
    "variance of each block",
)
_OUTPUT = 6
"""Figures before what inputs and weights together come to."""


def _imbalances(inspection: Inspection, title: str, part: Part, explain: bool) -> Sheet:
    lines = []
    for kind, sites in _by_kind(inspection).items():
        for method in inspection.methods:
            figures = _figures([part(site.methods[method]) for site in sites])
            errors = [site.methods[method].output_error for site in sites]
            known = [sqnr_db(error) for error in errors if error is not None]
            both = [f"{fmean(known):.2f} dB" if known else "-"] if explain else []
            lines.append([kind, method, *figures[:_OUTPUT], *both, *figures[_OUTPUT:]])
    output = ("output SQNR",) if explain else ()
    layers = len(next(iter(_by_kind(inspection).values())))
    calibration = inspection.calibration
    notes: tuple[str, ...] = (
        f"Of {calibration.get('tokens', 0):,} tokens of {calibration.get('source')!r}, scale rule "
        f"{inspection.scale_rule}, mean of {layers} layers and in brackets the worst one, which "
        "the bars are of. Loudest: the mean square of the loudest block of 32 over that of all "
        "(1.00: all are equally loud), and over the median one. Entropy: of the 15 values of "
        "E2M1, in bits, at most 3.91. Zero: codes that are 0. Cut: values beyond 6 times their "
        "scale. SQNR: of rounding, 10 log10 of signal over error; of the output: what the errors "
        "of inputs and weights come to behind the linears, on a sample.",
    )
    if inspection.outliers:
        notes += (
            f"Outliers {inspection.outliers!r}: channels of the same model rescaled exactly to "
            "that LLM's profile. Not a measurement of that LLM.",
        )
    notes += tuple(
        f"{site} (width {width}) stays in BF16: no multiple of 32."
        for site, width in inspection.unfit.items()
    )
    return Sheet(
        title=f"{title}: {inspection.model}",
        columns=("site", "transform", *_FIGURES[:_OUTPUT], *output, *_FIGURES[_OUTPUT:]),
        texts=2,
        lines=lines,
        notes=notes if explain else (),
        spare=("variance of each block", "/ median", "cut", "magnitudes 0 to 6", "zero"),
        grouped=True,
    )


def _figures(pictures: Sequence[Picture]) -> list[str]:
    worst = max(pictures, key=lambda picture: picture.max_over_mean)
    return [
        _with_worst([picture.max_over_mean for picture in pictures], max),
        _with_worst([picture.max_over_median for picture in pictures], max),
        f"{fmean(picture.entropy for picture in pictures):.3f}",
        f"{100 * fmean(picture.zero_share for picture in pictures):.1f} %",
        f"{100 * fmean(picture.cut_share for picture in pictures):.2f} %",
        f"{fmean(picture.sqnr for picture in pictures):.2f} dB",
        bars(worst.magnitude_counts),
        bars(worst.block_variances),
    ]


def _with_worst(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> str:
    mean = _ratio(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({_ratio(worst(values))})"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.2g}"


def _verdict(inspection: Inspection) -> Sheet:
    """Whether what transforms promise holds, counted site by site."""
    promises: tuple[tuple[str, Callable[[Picture, Picture], bool]], ...] = (
        ("level blocks", lambda a, b: _more_than(a.max_over_mean, b.max_over_mean)),
        ("even codes", lambda a, b: _more_than(b.entropy, a.entropy)),
        ("fewer zeros", lambda a, b: _more_than(a.zero_share, b.zero_share)),
        ("less error", lambda a, b: _more_than(a.relative_error, b.relative_error)),
    )
    identity, sites = inspection.methods[0], inspection.sites
    parts: tuple[tuple[str, Part], ...] = (
        ("inputs", lambda pair: pair.inputs),
        ("weights", lambda pair: pair.weights),
    )
    lines = []
    for method in inspection.methods[1:]:
        for name, part in parts:
            kept = [
                sum(
                    holds(part(site.methods["identity"]), part(site.methods[method]))
                    for site in inspection.sites
                )
                for _, holds in promises
            ]
            lines.append([method, name, *(f"{n} of {len(sites)}" for n in kept)])
        errors = [(s.methods[identity].output_error, s.methods[method].output_error) for s in sites]
        known = [(a, b) for a, b in errors if a is not None and b is not None]
        less = sum(_more_than(a, b) for a, b in known)
        lines.append([method, "outputs", "-", "-", "-", f"{less} of {len(known)}"])
    return Sheet(
        title="At how many sites a transform does what it promises",
        columns=("transform", "of", *(name for name, _ in promises)),
        texts=2,
        lines=lines,
        notes=(
            "Against identity, by more than one in a thousand: the loudest block nearer to the "
            "mean, higher entropy of the codes, fewer zeros, a smaller error of rounding.",
        ),
        spare=("fewer zeros",),
        grouped=True,
    )


def _more_than(one: float, other: float) -> bool:
    """By more than what float32 and chance make of a map that changes nothing."""
    return one > 1.001 * other


def _channels(inspection: Inspection, most: int | None) -> Sheet:
    """The sites that one channel rules, and what becomes of it."""

    def loudest(site: SiteRecord, method: str) -> float:
        return site.methods[method].inputs.worst_channels[0].share

    ranked = sorted(inspection.sites, key=lambda site: -loudest(site, "identity"))
    lines = [
        [
            site.site,
            str(site.methods["identity"].inputs.worst_channels[0].index),
            f"{site.width * loudest(site, 'identity'):,.1f}",
            *(f"{100 * loudest(site, method):.2f} %" for method in inspection.methods),
        ]
        for site in ranked[:most]
    ]
    return Sheet(
        title="The loudest channels of inputs",
        columns=("site", "channel", "times the mean", *inspection.methods),
        texts=1,
        lines=lines,
        notes=(
            "Share of a site's energy (sum of squares) that its loudest channel holds, under each "
            f"transform the loudest one there.{_more(ranked, most)}",
        ),
        spare=("times the mean", "channel", *inspection.methods[:0:-1]),
    )


def _tokens(inspection: Inspection, most: int | None) -> Sheet:
    """The rows that are far longer than others."""
    places = {
        **{f"behind {name}": found for name, found in inspection.residual_tokens.items()},
        **{site.site: site.massive_tokens for site in inspection.sites},
    }
    found = [(place, found[0]) for place, found in places.items() if found]
    found.sort(key=lambda item: -item[1].ratio)
    long = [item for item in found if item[1].ratio >= _MASSIVE]
    shown = (long or found[:1])[:most]
    lines = [
        [place, repr(token.text), str(token.window), str(token.position), f"{token.ratio:.1f}"]
        for place, token in shown
    ]
    note = (
        f"The longest vector of each place, {_MASSIVE:g} times the median or more, before any "
        f"transform.{_more(long, most)}"
        if long
        else f"No vector anywhere is {_MASSIVE:g} times as long as the median one: no massive "
        "tokens. The longest:"
    )
    return Sheet(
        title="Massive tokens",
        columns=("place", "token", "window", "position", "times the median"),
        texts=2,
        lines=lines,
        notes=(note,),
    )


def _harm(inspection: Inspection, most: int | None) -> Sheet:
    """KL by site and transform, ranked by what direct rounding does."""
    kl = {(each.site, each.method): each.kl for each in inspection.harm}
    before = [each.site for each in inspection.harm if each.method == inspection.methods[0]]
    ranked = sorted(before, key=lambda site: -kl[site, inspection.methods[0]])
    lines = [
        [site, *(f"{kl[site, method]:.5f}" for method in inspection.methods)]
        for site in ranked[:most]
    ]
    text = inspection.evaluation or {}
    return Sheet(
        title="Which sites hurt the model most: KL from BF16 with each quantized alone",
        columns=("site", *inspection.methods),
        texts=1,
        lines=lines,
        notes=(
            "In nats, mean of all predictions. Inputs and weights of that site in MXFP4, rounded "
            f"to nearest, all else in BF16; on {text.get('tokens', 0):,} tokens of "
            f"{text.get('source')!r}. The figures do not add up to that of the quantized model."
            f"{_more(ranked, most)}",
        ),
        spare=tuple(inspection.methods[:0:-1]),
    )


def every_site(inspection: Inspection) -> Iterator[Sheet]:
    """All figures of inputs, and of weights, without any mean over sites."""
    parts: tuple[tuple[str, Part], ...] = (
        ("inputs", lambda pair: pair.inputs),
        ("weights", lambda pair: pair.weights),
    )
    for name, part in parts:
        lines = [
            [site.site, method, *_figures([part(site.methods[method])]), _exponents(picture)]
            for site in inspection.sites
            for method in inspection.methods
            for picture in [part(site.methods[method])]
        ]
        yield Sheet(
            title=f"Every site: {name}",
            columns=("site", "transform", *_FIGURES, "scales"),
            texts=2,
            lines=lines,
            notes=("Scales: how many blocks have which power of two, from the lowest exponent.",),
        )


def _exponents(picture: Picture) -> str:
    exponents = sorted(map(int, picture.scale_exponents))
    span = range(exponents[0], exponents[-1] + 1)
    counts = [picture.scale_exponents.get(str(each), 0) for each in span]
    return f"2^{span[0]} {bars(counts)} 2^{span[-1]}"


def bars(values: Sequence[int | float], most: int = _BLOCKS) -> str:
    """A bar for each value, or for the highest of several neighbours, against the highest of all.

    Heights go by the value itself; what is not 0 is never quite nothing, because the lowest bar
    has a height too.
    """
    count = min(most, len(values))
    edges = [len(values) * at // count for at in range(count + 1)]
    tops = [max(values[start:stop]) for start, stop in pairwise(edges)]
    highest = max(tops)
    if not highest:
        return " " * count
    last = len(_BARS) - 1
    return "".join(_BARS[round(last * top / highest)] if top else " " for top in tops)


def _more(ranked: Sequence[object], most: int | None) -> str:
    left = 0 if most is None else len(ranked) - most
    return f" {left} more in --markdown and --json." if left > 0 else ""


def _by_kind(inspection: Inspection) -> dict[str, list[SiteRecord]]:
    found: dict[str, list[SiteRecord]] = {}
    for site in inspection.sites:
        found.setdefault(site.kind, []).append(site)
    return found


def _table(sheet: Sheet, width: int | None) -> Table:
    """A sheet for a terminal; columns that do not fit are left out, and the caption says so."""
    sizes = [
        max(len(line[at]) for line in (sheet.columns, *sheet.lines))
        for at in range(len(sheet.columns))
    ]
    shown = list(range(len(sheet.columns)))
    dropped: list[str] = []
    for name in sheet.spare:
        if width is None or sum(sizes[at] + 3 for at in shown) + 1 <= width:
            break
        shown.remove(sheet.columns.index(name))
        dropped.append(name)
    notes = list(sheet.notes)
    if dropped:
        notes.append(f"Left out for want of width: {', '.join(dropped)}. --markdown has them.")
    table = Table(
        title=escape(sheet.title),
        title_justify="left",
        caption=escape("\n".join(notes)) or None,
        caption_justify="left",
    )
    for at in shown:
        side: Literal["left", "right"] = "left" if at < sheet.texts else "right"
        table.add_column(escape(sheet.columns[at]), justify=side, no_wrap=True)
    for line, after in zip(sheet.lines, [*sheet.lines[1:], []], strict=True):
        ends = bool(after) and sheet.grouped and line[0] != after[0]
        table.add_row(*(escape(line[at]) for at in shown), end_section=ends)
    return table
