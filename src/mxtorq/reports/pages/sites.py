"""Values of sites in the order in which people look at them: by kind, then by layer."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from mxtorq.reports.blocks import Bars, Chart
from mxtorq.reports.schema import sqnr_db

_Value = TypeVar("_Value")
_PLACE = re.compile(r"(?:.*\.)?([0-9]+)\.([^.]+)")


def by_kind(values: Mapping[str, _Value]) -> dict[str, dict[str, _Value]]:
    """``{"down_in": {"0": value, ...}}`` of ``model.layers.0.down_in`` and its like."""
    kinds: dict[str, dict[str, _Value]] = {}
    for site, value in values.items():
        found = _PLACE.fullmatch(site)
        kind, layer = (found[2], found[1]) if found else (site.rpartition(".")[2], site)
        kinds.setdefault(kind, {})[layer] = value
    return kinds


def decibels(errors: Iterable[float]) -> tuple[float, float]:
    """Whole decibels that hold the SQNR of all errors but those of exact sites."""
    known = [sqnr_db(error) for error in errors if error > 0 and math.isfinite(error)]
    low, high = math.floor(min(known, default=0)), math.ceil(max(known, default=0))
    return float(low), float(max(high, low + 1))


def site_chart(errors: Mapping[str, float], how: str) -> Chart:
    """The error of every site; ``how`` it was quantized stands in the title."""
    panels = tuple(
        (kind, tuple((layer, error) for layer, error in layers.items()))
        for kind, layers in by_kind(errors).items()
    )
    worst = max(errors, key=lambda site: errors[site])
    return Chart(
        title=f"Output error of every site, {how}",
        description=f"Bars from zero, a panel for each kind of site and a bar for each layer. "
        f"The largest error is {errors[worst]:.3e}, of {worst}; the mean of "
        f"{len(errors)} sites is {sum(errors.values()) / len(errors):.3e}.",
        drawing=Bars(panels=panels, x_axis="layer", y_axis="relative squared output error"),
    )
