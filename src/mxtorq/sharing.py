"""The work on a layer that ranks share: who does what, and how the others get what came of it.

A transform is chosen and a matrix is rounded by one rank, and all of them need the result. Which
rank is a function of the sizes alone, so that nobody has to be asked. Transforms travel as their
kind and their tensors, as a checkpoint stores them; a kind that checkpoints do not know is one of
the caller's own, and is chosen anew by each rank, which gives the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from mxtorq.evaluation.fidelity import output_error
from mxtorq.export.named import transform_tensors
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import Scale, ScaledE2M1
from mxtorq.models.family import Site
from mxtorq.ranks import SOLO, Ranks, shares
from mxtorq.rounding.base import Rounding
from mxtorq.rounding.correction import correct_
from mxtorq.surgery.fuse import quantize_site_
from mxtorq.surgery.linear import fused_weights, linear_at
from mxtorq.transforms import KINDS
from mxtorq.transforms.base import Transform


class Group(NamedTuple):
    """Linears of a site that see the same tokens."""

    linears: tuple[str, ...]
    hessian: Callable[[], Tensor]
    """Gives the second moment of what they see, transformed."""
    sample: Tensor
    """Some of what they see."""
    correction: Callable[[], Sequence[Tensor]] | None = None
    """Gives what their transformed weights are multiplied with before they are rounded; asked
    before ``hessian``."""


def fitted_sites(
    layer: nn.Module, sites: Mapping[str, Site], fit: Callable[[str], Transform], ranks: Ranks
) -> dict[str, Transform]:
    """The transform of each site, which one rank has chosen with ``fit``."""
    costs = [_cost(layer, site.linears) for site in sites.values()]
    owners = zip(sites, shares(costs, ranks.size), strict=True)
    mine = {name: fit(name) for name, owner in owners if owner == ranks.rank}
    found = all_transforms(ranks, mine, fit)
    return {name: found[name] for name in sites}


def all_transforms(
    ranks: Ranks, mine: Mapping[str, Transform], again: Callable[[str], Transform]
) -> dict[str, Transform]:
    """The named transforms of all ranks; ``again`` gives one that cannot be sent."""
    known = {name: each for name, each in mine.items() if each.kind in KINDS}
    tensors = ranks.all_tensors(transform_tensors(known))
    kinds = ranks.all_json({name: [each.kind, each.width] for name, each in mine.items()})
    found: dict[str, Transform] = {}
    for name, (kind, width) in (pair for each in kinds for pair in each.items()):
        if name in mine:
            found[name] = mine[name]
        elif kind in KINDS:
            start = f"{name}."
            parts = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            found[name] = KINDS[kind].from_tensors(width, parts)
        else:
            found[name] = again(name)
    return found


def round_sites_(
    layer: nn.Module,
    sites: Mapping[str, Site],
    transforms: Mapping[str, Transform],
    groups: Callable[[str], list[Group]],
    rounding: Rounding,
    scale: Scale,
    activations: Scale,
    ranks: Ranks = SOLO,
) -> dict[str, float]:
    """Fuse, round and replace the linears of a layer; returns each site's output error.

    ``scale`` is that of weights.

    A site that is one rank's alone is replaced there at once, so that its weights and its Hessian
    need not wait for the other sites; by the other ranks, when they get the codes.
    """
    owners = rounders(layer, sites, ranks)
    codes: dict[str, MXFP4 | ScaledE2M1] = {}
    errors: dict[str, float] = {}
    waiting: dict[str, list[Group]] = {}
    for name, site in sites.items():
        if ranks.rank not in owners[name]:
            continue
        found = groups(name)
        mine = [g for g, owner in zip(found, owners[name], strict=True) if owner == ranks.rank]
        # Where there are several groups, some may share a Hessian, so none is given away.
        choose = rounding.round_ if len(found) == 1 else rounding.round
        codes |= round_groups(layer, mine, transforms[name], choose, scale)
        if set(owners[name]) == {ranks.rank}:
            errors[name] = replace_site_(layer, site, transforms[name], found, codes, activations)
        elif owners[name][0] == ranks.rank:
            waiting[name] = found
    codes = all_codes(ranks, codes, scale)
    for name, site in sites.items():
        if name in waiting:
            left = waiting[name]
            errors[name] = replace_site_(layer, site, transforms[name], left, codes, activations)
        elif name not in errors:
            quantize_site_(layer, site, transforms[name], codes, activations)
    return {name: error for each in ranks.all_json(errors) for name, error in each.items()}


def round_groups(
    layer: nn.Module,
    groups: list[Group],
    transform: Transform,
    choose: Callable[..., MXFP4 | ScaledE2M1],
    scale: Scale,
) -> dict[str, MXFP4 | ScaledE2M1]:
    """The codes of linears of one site, by path.

    Those that see the same tokens are rounded as one stacked matrix, as GPTQ's Hessian is one for
    them. ``choose`` is a rounding's `round` or `round_`.
    """
    order = [path for group in groups for path in group.linears]
    rows = [linear_at(layer, path).out_features for path in order]
    kept: MXFP4 | ScaledE2M1 | None = None
    done = 0
    for group in groups:
        linears = [linear_at(layer, path) for path in group.linears]
        weight = fused_weights(linears, transform)
        if group.correction is not None:
            correct_(weight, group.correction())
        codes = choose(weight, group.hessian, scale)
        if len(groups) == 1:
            kept = codes
            break
        if kept is None:  # small pieces that stay would leave holes in the heap behind each group
            kept = type(codes)(*(part.new_empty(sum(rows), part.shape[1]) for part in codes))
        for whole, part in zip(kept, codes, strict=True):
            whole[done : done + len(part)] = part
        done += len(codes[0])
    if kept is None:
        return {}
    parts = zip(*(part.split(rows) for part in kept), strict=True)
    return {path: type(kept)(*part) for path, part in zip(order, parts, strict=True)}


def replace_site_(
    layer: nn.Module,
    site: Site,
    transform: Transform,
    groups: list[Group],
    codes: Mapping[str, MXFP4 | ScaledE2M1],
    activations: Scale,
) -> float:
    """Put the codes of a site into its place; returns the output error on the samples."""
    originals = {path: linear_at(layer, path) for path in site.linears}
    quantize_site_(layer, site, transform, codes, activations)
    return output_error(
        (group.sample, originals[path], layer.get_submodule(path))
        for group in groups
        if len(group.sample)  # an expert that no token went to has no outputs
        for path in group.linears
    )


def rounders(
    layer: nn.Module, sites: Mapping[str, Site], ranks: Ranks
) -> dict[str, tuple[int, ...]]:
    """The rank that rounds each group of linears (`Site.groups`) of each site."""
    costs = [_cost(layer, group) for site in sites.values() for group in site.groups]
    owners = iter(shares(costs, ranks.size))
    return {name: tuple(next(owners) for _ in site.groups) for name, site in sites.items()}


def all_codes(
    ranks: Ranks, mine: Mapping[str, MXFP4 | ScaledE2M1], scale: Scale
) -> dict[str, MXFP4 | ScaledE2M1]:
    """The codes of all ranks, by linear; all of the kind that ``scale`` makes."""
    kind = MXFP4 if isinstance(scale, ScaleRule) else ScaledE2M1
    parts = ranks.all_tensors(
        {
            f"{path}/{part}": tensor
            for path, codes in mine.items()
            for part, tensor in zip(codes._fields, codes, strict=True)
        }
    )
    paths = dict.fromkeys(name.rpartition("/")[0] for name in parts)
    return {path: kind(*(parts[f"{path}/{part}"] for part in kind._fields)) for path in paths}


def _cost(layer: nn.Module, linears: Iterable[str]) -> int:
    """In operations, about: each row is rounded with the help of a matrix of its width."""
    found = [linear_at(layer, path) for path in linears]
    return sum(linear.out_features * linear.in_features**2 for linear in found)
