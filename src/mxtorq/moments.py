"""What a rounding is told of the inputs: their moments, as they are or as rounding leaves them.

A rounding asks for a Hessian when it comes to a site, and it ends with that, so that one site's
matrices are in memory beside those that still wait. Which moments there are is the rounding's
choice: of plain inputs, which calibration has summed up already, or of rounded ones, in one more
pass over the layer. A pass is also what it takes to correct weights for what rounding does to
inputs (`rounding.correction`), with moments within blocks of channels alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

from torch import Tensor, nn

from mxtorq.calibration.capture import LayerInput, capture_hessians, capture_pairs
from mxtorq.calibration.experts import ExpertInputs
from mxtorq.calibration.statistics import Pair
from mxtorq.config import Recipe
from mxtorq.formats.scales import Scale
from mxtorq.kernels.dispatch import fake_quantize
from mxtorq.models.family import Site
from mxtorq.ranks import SOLO, Ranks
from mxtorq.rounding.base import Rounding
from mxtorq.rounding.correction import CORRECTION_BLOCK
from mxtorq.sharing import Group
from mxtorq.transforms.base import SiteStatistics, Transform


class Moments(NamedTuple):
    """Of a site's transformed inputs."""

    hessian: Callable[[], Tensor]
    """The second moment that a rounding works with; may be asked for once."""
    correction: Callable[[], Sequence[Tensor]] | None = None
    """What transformed weights are multiplied with beforehand, block by block; asked for before
    ``hessian``."""


def needs_hessians(recipe: Recipe) -> bool:
    """Whether the second moments of the inputs are of use to a method or to a rounding."""
    return recipe.method.needs_hessian or _rounds_by_plain(recipe.rounding)


def rounding_moments_(
    layer: nn.Module,
    sites: dict[str, Site],
    inputs: Sequence[LayerInput],
    transforms: Mapping[str, Transform],
    statistics: dict[str, SiteStatistics],
    recipe: Recipe,
    ranks: Ranks = SOLO,
) -> dict[str, Moments]:
    """What gives a rounding the moments of each site's transformed inputs, when it asks: once.

    ``statistics`` are left without second moments and weights, which nothing needs any more. So a
    Hessian ends with the rounding that asked for it, and a weight when its linear is replaced.
    """
    rounding = recipe.rounding
    keeps, moments = _rounds_by_plain(rounding), {}
    for name, seen in list(statistics.items()):
        statistics[name] = replace(seen, second_moment=None, weights=())
        moments[name] = replace(
            statistics[name], second_moment=seen.second_moment if keeps else None
        )
    plain = {name: partial(_take_hessian_, moments, name, transforms[name]) for name in sites}
    scale = recipe.activation_rule
    asked = {name: _Kept(each) for name, each in plain.items()}
    hessians = {name: each.take for name, each in asked.items()}
    if rounding.sees_rounded_inputs:
        rounded = capture_hessians(layer, sites, inputs, _after(transforms, scale), ranks)
        hessians = {name: partial(rounded.pop, name) for name in sites}
    if not rounding.corrects_inputs:
        return {name: Moments(hessians[name]) for name in sites}
    both = {name: partial(_both, each, scale) for name, each in transforms.items()}
    pairs = capture_pairs(layer, sites, inputs, CORRECTION_BLOCK, both, ranks)
    return {
        name: Moments(
            hessians[name], partial(_corrections, rounding, asked[name].look, pairs[name])
        )
        for name in sites
    }


def expert_moments(
    transforms: Mapping[str, Transform], recipe: Recipe
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is done to the inputs of experts before a rounding looks at them, if it does."""
    if not recipe.rounding.compensates:
        return {}
    if recipe.rounding.sees_rounded_inputs:
        return _after(transforms, recipe.activation_rule)
    return _before(transforms)


def site_groups(
    site: Site,
    moments: Moments,
    statistics: SiteStatistics,
    experts: list[ExpertInputs],
) -> list[Group]:
    """The linears of a site that are rounded together: all, or expert by expert.

    An expert without a Hessian of its own takes that of the site, which is computed once for all.
    What corrects weights for rounded inputs is the site's for all experts: they share the transform
    and its blocks, and so what rounding does to an input.
    """
    if not experts:
        return [Group(site.linears, moments.hessian, statistics.sample, moments.correction)]
    pooled = cache(moments.hessian)
    shared = None if moments.correction is None else cache(moments.correction)
    return [
        Group(linears, expert.hessian or pooled, expert.sample, shared)
        for linears, expert in zip(site.groups, experts, strict=True)
    ]


def groups_of(
    sites: Mapping[str, Site],
    moments: Mapping[str, Moments],
    statistics: Mapping[str, SiteStatistics],
    routed: Mapping[str, list[ExpertInputs]],
    name: str,
) -> list[Group]:
    """The groups of the site called ``name``."""
    return site_groups(sites[name], moments[name], statistics[name], routed.get(name, []))


def _rounds_by_plain(rounding: Rounding) -> bool:
    """Whether a rounding asks for the second moment of the inputs before their rounding."""
    return rounding.needs_hessian and (rounding.corrects_inputs or not rounding.sees_rounded_inputs)


def _before(transforms: Mapping[str, Transform]) -> dict[str, Callable[[Tensor], Tensor]]:
    """What turns each site's inputs into those that are rounded."""
    return {name: partial(_transformed, each) for name, each in transforms.items()}


def _after(
    transforms: Mapping[str, Transform], scale: Scale
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What turns each site's inputs into the rounded ones that weights meet."""
    return {name: partial(_through, each, scale) for name, each in transforms.items()}


def _through(transform: Transform, scale: Scale, values: Tensor) -> Tensor:
    return fake_quantize(transform.online(values.float()), scale)


def _both(transform: Transform, scale: Scale, values: Tensor) -> tuple[Tensor, Tensor]:
    """What `_transformed` and `_through` give."""
    online = transform.online(values.float())
    plain = online if transform.exact_online else _transformed(transform, values)
    return plain, fake_quantize(online, scale)


def _transformed(transform: Transform, values: Tensor) -> Tensor:
    return transform.apply(values.float())


def _take_hessian_(
    statistics: dict[str, SiteStatistics], name: str, transform: Transform
) -> Tensor:
    return statistics.pop(name).transformed_hessian(transform, overwrite=True)


class _Kept:
    """A matrix that is made when it is looked at, and let go of when it is taken."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make, self._made = make, list[Tensor]()

    def look(self) -> Tensor:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]

    def take(self) -> Tensor:
        self.look()
        return self._made.pop()


def _corrections(
    rounding: Rounding, hessian: Callable[[], Tensor], pairs: Sequence[Pair]
) -> list[Tensor]:
    moment = hessian()
    size = CORRECTION_BLOCK
    spans = [slice(at, at + size) for at in range(0, len(moment), size)]
    return [
        rounding.correction(moment[span, span], *pair)
        for span, pair in zip(spans, pairs, strict=True)
    ]
