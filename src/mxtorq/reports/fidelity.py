"""How sure a figure is and how faithful a method, as cells and Markdown tables.

The intervals themselves stand in `intervals`; here is what a table says of them. ``vs best`` is a
word, so that nobody has to compare numbers: ``best`` for the lowest figure, ``tie`` where the
interval of the difference to it holds 0, ``worse`` where it does not.
"""

from collections.abc import Sequence

from mxtorq.reports.intervals import FEWEST, are_paired, difference
from mxtorq.reports.schema import Row, sqnr_db

NOTE = (
    "95 %: where the change of the perplexity from BF16 lies, by a bootstrap over the windows of "
    "the text, both models on the same ones; several seeds widen it. vs best: tie where the "
    "difference to the lowest perplexity of that part may be nothing, worse where it is real. "
    f"Both need {FEWEST} windows."
)


def interval_cell(group: Sequence[Row], baseline: Row | None) -> str:
    """Both ends of the change of the perplexity from the baseline, or a dash."""
    if baseline is None or group[0].rounding is None or not are_paired([*group, baseline]):
        return "-"
    found = difference(group, [baseline])
    if found is None:
        return "-"
    low, high = (f"{end:+.2f}" if end < 1e4 else f"{end:+.1e}" for end in found.percent())
    return f"{low} to {high} %"


def marks(groups: Sequence[Sequence[Row]], figure: str = "nll") -> list[str]:
    """``best``, ``tie``, ``worse`` or a dash for each group, among those with its outliers."""
    words = ["-"] * len(groups)
    for outliers in dict.fromkeys(group[0].outliers for group in groups):
        rivals = [
            at
            for at, group in enumerate(groups)
            if group[0].outliers == outliers and group[0].rounding is not None
        ]
        if len(rivals) < 2 or not are_paired([row for at in rivals for row in groups[at]], figure):
            continue
        best = min(rivals, key=lambda at: _mean([sum(r.windows[figure]) for r in groups[at]]))
        for at in rivals:
            found = difference(groups[at], groups[best], figure)
            if found is not None:
                words[at] = "best" if at == best else "worse" if found.is_real else "tie"
    return words


def fidelity_table(
    groups: Sequence[Sequence[Row]], heads: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Lines of a table: KL and its tail, how often the same token is likeliest, and the stream.

    Args:
        groups: rows that differ in their seed only.
        heads: the first cells of each line.
    """
    measured = [at for at, group in enumerate(groups) if group[0].kl_p99 is not None]
    words = marks([groups[at] for at in measured], "kl")
    lines = []
    for at, word in zip(measured, words, strict=True):
        group = groups[at]
        layers = [row.layer_errors for row in group if row.layer_errors]
        names = list(layers[0]) if layers else []
        places = dict.fromkeys(names[i] for i in (0, len(names) // 2, -1)) if names else {}
        stream = [
            f"{sqnr_db(_mean([errors[name] for errors in layers if name in errors])):.1f}"
            for name in places
        ]
        lines.append(
            [
                *heads[at],
                f"{_mean([row.kl for row in group if row.kl is not None]):.4f}",
                word,
                f"{_mean([row.kl_p99 for row in group if row.kl_p99 is not None]):.3f}",
                f"{100 * _mean([r.agreement for r in group if r.agreement is not None]):.2f} %",
                f"{' / '.join(stream)} dB" if stream else "-",
            ]
        )
    return lines


FIDELITY_COLUMNS = (
    "KL",
    "vs best",
    "99th percentile of KL",
    "same likeliest token",
    "residual stream behind first / middle / last layer",
)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
