"""What happens inside of a model: rotate, capture, fit, merge, fuse, round; layer by layer.

The output of the *quantized* layer feeds the next, so every method meets the inputs that it will
really have. One layer's statistics are in memory at a time.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from mxtorq.calibration.capture import (
    LayerInput,
    advance_,
    capture_sites,
    each_first_input,
    reader_weights,
)
from mxtorq.calibration.experts import ExpertInputs, capture_experts
from mxtorq.choosing import (
    is_plain,
    joined_,
    least_batches,
    statistics_to_choose_by,
)
from mxtorq.config import Recipe
from mxtorq.export.manifest import SiteEntry
from mxtorq.export.targets import carried
from mxtorq.loading.at_rest import embedded, staged_
from mxtorq.loading.source import Source, place
from mxtorq.models.family import Family, Site
from mxtorq.moments import expert_moments, groups_of, needs_hessians, rounding_moments_
from mxtorq.ranks import SOLO, Ranks
from mxtorq.sharing import fitted_sites, round_sites_
from mxtorq.surgery.fuse import require_fit
from mxtorq.surgery.network import network
from mxtorq.surgery.offline import apply_offline_, round_kept_
from mxtorq.surgery.rescale import can_merge, merge_diagonal_
from mxtorq.transforms.base import OfflineRotations, SiteStatistics, Transform

Progress = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)."""


class QuantizedLayer(NamedTuple):
    """What was done to a layer."""

    transforms: dict[str, Transform]
    """By site."""
    sites: list[SiteEntry]
    search_seconds: float
    """Time in which the method chose its transforms."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """What `quantize_` did to a model."""

    transforms: dict[str, Transform]
    """By site."""
    sites: list[SiteEntry]
    unfit: dict[str, int]
    search_seconds: float
    """Time in which the method chose its transforms."""


class Stopwatch:
    """Sums up the time spent inside of its ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        self.seconds += time.perf_counter() - self._started


def quantize_(
    source: Source, windows: Int64[Tensor, "n seqlen"], recipe: Recipe, progress: Progress
) -> Quantized:
    """Quantize a model in place, all of it in memory."""
    unfit = require_fit(source.model, source.family, recipe.allow_unfit)
    searching = Stopwatch()
    with searching:
        merge_rotations_(source, choose_rotations(source, windows, recipe, progress), unfit)
    least = least_batches(recipe.method)
    inputs = list(first_inputs(source, windows, least=least))
    layers: list[QuantizedLayer] = []
    for _, _, done in quantize_layers_(source, inputs, recipe, unfit, progress):
        layers.append(done)
    return Quantized(
        transforms={name: each for done in layers for name, each in done.transforms.items()},
        sites=[entry for done in layers for entry in done.sites],
        unfit=unfit,
        search_seconds=searching.seconds + sum(done.search_seconds for done in layers),
    )


def first_inputs(
    source: Source, windows: Int64[Tensor, "n seqlen"], ranks: Ranks = SOLO, least: int = 1
) -> Iterator[LayerInput]:
    """What the first decoder layer gets, batch by batch; of several ranks this one's batches.

    ``least`` as in `calibration.capture.batches`.
    """
    with embedded(source):
        yield from each_first_input(
            source.model, source.family, windows, source.device, source.dtype, ranks, least
        )


def quantize_layers_(
    source: Source,
    inputs: Sequence[LayerInput],
    recipe: Recipe,
    unfit: Mapping[str, int],
    progress: Progress,
    start: int = 0,
    ranks: Ranks = SOLO,
) -> Iterator[tuple[int, nn.Module, QuantizedLayer]]:
    """Quantize layer after layer in place: the quantized layer's output feeds the next.

    Args:
        source: the model.
        inputs: what the layer ``start`` gets, this rank's part; always what the next one gets.
        recipe: how.
        unfit: sites that stay in BF16.
        progress: told after each layer.
        start: the first layer that is not quantized yet.
        ranks: who shares the work. Each of them has the quantized layer in the end.

    Yields:
        The index of a layer, the layer, and what was done. Nothing here needs it any more, so that
        the caller may let go of its tensors.
    """
    family = source.family
    total = len(list(source.model.get_submodule(family.layers).children()))
    progress("quantize", start, total)
    for index, layer in staged_(source, start):
        sites = {family.site_name(index, site): site for site in family.sites}
        sites = {name: site for name, site in sites.items() if name not in unfit}
        done = quantize_layer_(family, index, layer, sites, inputs, recipe, ranks)
        advance_(layer, inputs)
        yield index, layer, done
        progress("quantize", index + 1, total)


def quantize_layer_(
    family: Family,
    index: int,
    layer: nn.Module,
    sites: dict[str, Site],
    inputs: Sequence[LayerInput],
    recipe: Recipe,
    ranks: Ranks,
) -> QuantizedLayer:
    """Quantize the sites of a layer in place; what was measured for it ends with this."""
    held_out: dict[str, SiteStatistics] = {}
    if recipe.method.chooses:
        statistics, held_out = statistics_to_choose_by(layer, sites, inputs, recipe, ranks)
    else:
        needed = needs_hessians(recipe)
        statistics = capture_sites(layer, sites, inputs, recipe.seed, hessians=needed, ranks=ranks)
    choices: dict[str, dict[str, Any]] = {}
    with Stopwatch() as searching:
        # The partial ends here: it would keep moments and weights until the layer is done.
        fitted = fitted_sites(layer, sites, partial(_fitted, recipe, statistics, choices), ranks)
    if recipe.method.chooses:
        choices = {name: each for part in ranks.all_json(choices) for name, each in part.items()}
        statistics = joined_(statistics, held_out)
    fitted, statistics = merge_diagonals_(layer, sites, fitted, statistics)
    fitted = {
        name: carried(fitted[name], recipe.target, name, plain=is_plain(layer, site))
        for name, site in sites.items()
    }
    moments = rounding_moments_(layer, sites, inputs, fitted, statistics, recipe, ranks)
    through = expert_moments(fitted, recipe)
    routed = capture_experts(layer, family.experts, sites, inputs, through, ranks)
    groups = partial(groups_of, sites, moments, statistics, routed)
    scales = recipe.scale_rule, recipe.activation_rule
    errors = round_sites_(layer, sites, fitted, groups, recipe.rounding, *scales, ranks)
    entries = [
        _site_entry(
            family,
            index,
            site,
            fitted[name],
            errors[name],
            routed.get(name, []),
            choices.get(name),
        )
        for name, site in sites.items()
    ]
    return QuantizedLayer(fitted, entries, searching.seconds)


def choose_rotations(
    source: Source, windows: Int64[Tensor, "n seqlen"], recipe: Recipe, progress: Progress
) -> OfflineRotations:
    """The method's rotations of the whole model, if it has any."""
    if not recipe.method.rotates:
        return OfflineRotations()
    whole = replace(
        network(place(source.model, source.device), source.family, windows),
        progress=lambda done, total: progress("rotate", done, total),
    )
    return recipe.method.rotations(whole, recipe.seed)


def merge_rotations_(source: Source, rotations: OfflineRotations, unfit: Mapping[str, int]) -> None:
    """Merge rotations into the weights of a model, and round what will stay in BF16."""
    if rotations == OfflineRotations():
        return
    model, family = source.model, source.family
    apply_offline_(model, family, rotations)
    layers = len(list(model.get_submodule(family.layers).children()))
    sites = [
        (index, site)
        for index in range(layers)
        for site in family.sites
        if family.site_name(index, site) not in unfit
    ]
    round_kept_(
        model, {family.linear_name(index, path) for index, site in sites for path in site.linears}
    )


def merge_diagonals_(
    layer: nn.Module,
    sites: Mapping[str, Site],
    fitted: Mapping[str, Transform],
    statistics: Mapping[str, SiteStatistics],
) -> tuple[dict[str, Transform], dict[str, SiteStatistics]]:
    """Merge what can be merged; returns what is left online, and statistics that fit it.

    All sites come before any is rounded: the factors of o_in and down_in change rows of v_proj and
    up_proj, which other sites read. A matrix that stays in BF16 is left alone. The second moments
    of ``statistics`` are rescaled where they are.
    """
    rest, seen = dict(fitted), dict(statistics)
    for name, site in sites.items():
        if can_merge(layer, sites, site):
            rest[name], factors = merge_diagonal_(layer, site, fitted[name], torch.bfloat16)
            if factors is not None:
                seen[name] = statistics[name].rescaled(factors, overwrite=True)
    rest = {name: part.to(statistics[name].amax.device) for name, part in rest.items()}
    return rest, {
        name: replace(seen[name], weights=reader_weights(layer, site))
        for name, site in sites.items()
    }


def _fitted(
    recipe: Recipe,
    statistics: Mapping[str, SiteStatistics],
    choices: dict[str, dict[str, Any]],
    name: str,
) -> Transform:
    device = statistics[name].amax.device
    if not recipe.method.chooses:
        return recipe.method.fit(statistics[name], recipe.seed).to(device)
    choice = recipe.method.choose(statistics[name], recipe.seed)
    choices[name] = {
        "candidate": choice.name,
        "losses": dict(choice.losses),
        "at_least": dict(choice.at_least),
    }
    return choice.transform.to(device)


def _site_entry(
    family: Family,
    index: int,
    site: Site,
    transform: Transform,
    error: float,
    experts: list[ExpertInputs],
    choice: dict[str, Any] | None,
) -> SiteEntry:
    counts = {
        "count": len(experts),
        "pooled": sum(expert.tokens < transform.width for expert in experts),
        "unseen": sum(expert.tokens == 0 for expert in experts),
    }
    return SiteEntry(
        site=family.site_name(index, site),
        linears=[family.linear_name(index, path) for path in site.linears],
        width=transform.width,
        kind=transform.kind,
        multiply_adds=transform.multiply_adds,
        extra_bytes=sum(
            part.numel() * part.element_size() for part in transform.tensors().values()
        ),
        output_error=error,
        experts=counts if experts else None,
        choice=choice,
    )
