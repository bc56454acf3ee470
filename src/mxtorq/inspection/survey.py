"""All sites of a model under several methods, measured layer by layer.

The model runs unquantized: what reaches a site is what BF16 gives, so that methods are compared on
the same inputs. (`quantization` feeds each layer what the quantized one before it has made.) Each
layer runs twice over the text, once for the statistics that methods are fitted to and once for the
measures of every method, which see every token and not a sample.

The price: one more pass than a calibration, and a rounding of each input under each method.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from mxtorq.calibration.capture import LayerInput, advance_, capture_sites
from mxtorq.choosing import joined_, least_batches, statistics_to_choose_by
from mxtorq.config import Recipe
from mxtorq.evaluation.fidelity import output_error
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.inspection.measures import Lengths, LongRow, Measure
from mxtorq.kernels.dispatch import quantize
from mxtorq.loading.at_rest import staged_
from mxtorq.loading.skeleton import empty_
from mxtorq.loading.source import Source
from mxtorq.models.family import Site
from mxtorq.quantization import first_inputs
from mxtorq.reports.inspection import Pair, Picture
from mxtorq.surgery.fuse import quantize_site_
from mxtorq.surgery.linear import fused_weights, linear_at
from mxtorq.transforms.base import SiteStatistics, Transform, TransformMethod

Key = tuple[str, str]
"""A site's full name and a method's."""


@dataclass
class SurveyedLayer:
    """What was found at a layer."""

    index: int
    pairs: dict[Key, Pair] = field(default_factory=dict)
    lengths: dict[str, list[LongRow]] = field(default_factory=dict)
    """The longest inputs by site."""
    residual: list[LongRow] = field(default_factory=list)
    """The longest hidden states behind the layer."""
    replacements: dict[Key, dict[str, nn.Module]] = field(default_factory=dict)
    """The quantized linears of each site, by full name, where they were asked for."""


def survey(
    source: Source,
    windows: Int64[Tensor, "n seqlen"],
    methods: Mapping[str, TransformMethod],
    sites: Sequence[str],
    rule: ScaleRule,
    seed: int,
    *,
    replacements: bool = False,
) -> Iterator[SurveyedLayer]:
    """Measure each site under each method, layer after layer; the model stays as it is.

    Args:
        source: the model, in memory or at rest.
        windows: of the text.
        methods: by name.
        sites: full names of those to measure.
        rule: how block scales are chosen.
        seed: of fitting.
        replacements: keep the quantized linears too.
    """
    family = source.family
    least = max(map(least_batches, methods.values()), default=1)
    inputs = list(first_inputs(source, windows, least=least))
    for index, layer in staged_(source):
        named = {family.site_name(index, site): site for site in family.sites}
        named = {name: site for name, site in named.items() if name in sites}
        found = SurveyedLayer(index)
        transforms, samples = fitted(layer, named, inputs, methods, rule, seed)
        seen = pass_(layer, named, inputs, transforms, rule, found)
        for (name, method), transform in transforms.items():
            weights = Measure(transform.width, rule)
            for path in named[name].linears:
                weights.add(fused_weights([linear_at(layer, path)], transform))
            made = quantized_linears(layer, named[name], transform, rule)
            triples = ((samples[name], linear_at(layer, path), made[path]) for path in made)
            found.pairs[name, method] = Pair(
                inputs=seen[name, method],
                weights=weights.finish(),
                output_error=None if named[name].experts else output_error(triples),
            )
            if replacements:
                found.replacements[name, method] = {
                    family.linear_name(index, path): module for path, module in made.items()
                }
        if source.shards is not None:
            empty_(layer)
        yield found


def fitted(
    layer: nn.Module,
    sites: Mapping[str, Site],
    inputs: Sequence[LayerInput],
    methods: Mapping[str, TransformMethod],
    rule: ScaleRule,
    seed: int,
) -> tuple[dict[Key, Transform], dict[str, Tensor]]:
    """The transform of each site under each method, and a sample of each site's inputs."""
    needed = any(method.needs_hessian for method in methods.values())
    if not sites:
        return {}, {}
    choosing = {called: method for called, method in methods.items() if method.chooses}
    others = {called: method for called, method in methods.items() if not method.chooses}
    transforms: dict[Key, Transform] = {}
    if choosing:  # what is judged by does not depend on which of them it is
        asked = Recipe(method=next(iter(choosing.values())), scale_rule=rule, seed=seed)
        statistics, held_out = statistics_to_choose_by(layer, dict(sites), inputs, asked)
        transforms = _fitted(statistics, choosing, seed)
        statistics = joined_(statistics, held_out)
    else:
        statistics = capture_sites(layer, dict(sites), inputs, seed, hessians=needed)
    transforms |= _fitted(statistics, others, seed)
    return transforms, {name: seen.sample for name, seen in statistics.items()}


def _fitted(
    statistics: Mapping[str, SiteStatistics], methods: Mapping[str, TransformMethod], seed: int
) -> dict[Key, Transform]:
    return {
        (name, called): method.fit(seen, seed).to(seen.amax.device)
        for name, seen in statistics.items()
        for called, method in methods.items()
    }


def quantized_linears(
    layer: nn.Module, site: Site, transform: Transform, rule: ScaleRule
) -> dict[str, nn.Module]:
    """The linears of a site in W4A4, rounded to nearest, by path; the layer stays as it is."""
    originals = {path: linear_at(layer, path) for path in site.linears}
    codes = {
        path: quantize(fused_weights([linear], transform), rule)
        for path, linear in originals.items()
    }
    quantize_site_(layer, site, transform, codes, rule)
    made = {path: layer.get_submodule(path) for path in originals}
    for path, linear in originals.items():
        layer.set_submodule(path, linear)
    return made


@torch.no_grad()
def pass_(
    layer: nn.Module,
    sites: Mapping[str, Site],
    inputs: Sequence[LayerInput],
    transforms: Mapping[Key, Transform],
    rule: ScaleRule,
    found: SurveyedLayer,
) -> dict[Key, Picture]:
    """Run a layer over its inputs, which become its outputs, and measure what its sites get."""
    measures = {key: Measure(each.width, rule) for key, each in transforms.items()}
    # Where experts share the tokens out, a row's number is not that of a token.
    lengths = {name: Lengths() for name, site in sites.items() if site.passes == 1}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].flatten(0, -2).float()
            if name in lengths:
                lengths[name].add(rows)
            for key, measure in measures.items():
                if key[0] == name:
                    measure.add(transforms[key].apply(rows))

        return record

    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(recorder(name))
        for name, site in sites.items()
        for path in site.taps
    ]
    try:
        advance_(layer, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    residual = Lengths()
    for item in inputs:
        residual.add(item.hidden)
    found.residual = residual.longest()
    found.lengths = {name: each.longest() for name, each in lengths.items()}
    return {key: measure.finish() for key, measure in measures.items()}
