"""What a method that chooses is given of a layer, and what is kept of its choices.

Such a method (`TransformMethod.chooses`) fits candidates to the statistics of the first batches of
the calibration text, and judges them on the last ones, an eighth of all, that no candidate has seen
(`hold_out`). What an error is worth it reads off gradients (`calibration.gradients`), of the first
batches where something is fitted to them, and of a few windows of the last one where it is judged.
When it has chosen, the moments of both parts are added up, so that weights are rounded by all
tokens, and all of this costs one pass over the text, as for any method, and a backward pass over
two batches and these windows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from mxtorq.calibration.capture import LayerInput, capture_split
from mxtorq.calibration.gradients import BATCHES, capture_gradients
from mxtorq.config import Recipe
from mxtorq.errors import UsageError
from mxtorq.export.targets import Target, runs
from mxtorq.kernels.dispatch import dequantize
from mxtorq.models.family import Site
from mxtorq.ranks import SOLO, Ranks
from mxtorq.surgery.linear import linear_at
from mxtorq.surgery.rescale import can_merge, merges, split_diagonal
from mxtorq.transforms.base import Judgement, SiteStatistics, Transform, TransformMethod
from mxtorq.transforms.mxtorq.loss import GRADIENTS, evenly

_EIGHTH = 8
_JUDGED = 2 * GRADIENTS
"""Tokens of the last batch that get gradients: more than are looked at, so that those are of
several windows where windows are short."""


def least_batches(method: TransformMethod) -> int:
    """Batches that the calibration text is cut into at least."""
    return 2 if method.chooses else 1


def require_windows(method: TransformMethod, windows: int) -> None:
    """Refuse a text that cannot be cut in two, before any work.

    Raises:
        UsageError: a method that chooses would have one window alone.
    """
    if method.chooses and windows < 2:
        raise UsageError(
            asked="a choice among transforms by what they lose on held-out text",
            found="one window of calibration text",
            why="candidates are fitted to some windows and judged on others",
            todo="pass more --calibration-tokens or a smaller --seqlen, or a method that does not "
            "choose, such as wush",
        )


def hold_out(inputs: Sequence[LayerInput], ranks: Ranks = SOLO) -> int:
    """How many tokens are held out: those of the last batches, about an eighth, of all ranks.

    There are two batches at least: see `require_windows` and `least_batches`.
    """
    counts = ranks.all_json([item.tokens for item in inputs])
    steps = max(map(len, counts))
    sizes = [count[step] for step in range(steps) for count in counts if step < len(count)]
    return sum(sizes[-max(1, round(len(sizes) / _EIGHTH)) :])


def statistics_to_choose_by(
    layer: nn.Module,
    sites: dict[str, Site],
    inputs: Sequence[LayerInput],
    recipe: Recipe,
    ranks: Ranks = SOLO,
) -> tuple[dict[str, SiteStatistics], dict[str, SiteStatistics]]:
    """The statistics of each site, with what candidates are judged by, and those held out.

    Args:
        layer: the decoder layer, unquantized.
        sites: by full name.
        inputs: the layer's inputs, those of this rank.
        recipe: by which a run rounds, and for whom.
        ranks: who shares the work.

    Raises:
        ModelError: an activation or a gradient is NaN or Inf.
    """
    last = sum(ranks.all_json(len(inputs))) - 1
    capture = partial(capture_gradients, layer, sites, inputs, recipe.seed, ranks)
    others = capture(batches=(last,), tokens=_JUDGED, weighs_outputs=False)
    some = {
        name: each.rows[evenly(len(each.rows), GRADIENTS).to(each.rows.device)]
        for name, each in others.items()
    }
    del others  # the moments below are what takes memory
    gradients = capture(batches=range(min(BATCHES, last)))
    held_out = hold_out(inputs, ranks)
    pairs = capture_split(layer, sites, inputs, recipe.seed, held_out, ranks)
    seen = {}
    for name, (first, final) in pairs.items():
        judgement = Judgement(
            held_out=final.sample,
            gradients=gradients[name].rows,
            held_out_gradients=some[name],
            output_weights=gradients[name].output_weights,
            activations=recipe.activation_rule,
            corrected=recipe.rounding.corrects_inputs,
            rounded=partial(_rounded, recipe),
            **_served(layer, sites, sites[name], recipe.target),
        )
        seen[name] = replace(first, judgement=judgement)
    return seen, {name: final for name, (_, final) in pairs.items()}


def joined_(
    seen: Mapping[str, SiteStatistics], held_out: dict[str, SiteStatistics]
) -> dict[str, SiteStatistics]:
    """The statistics of all tokens, without what candidates were judged by.

    Second moments are added up where they are, and ``held_out`` is emptied.
    """
    return {name: _joined_(first, held_out.pop(name)) for name, first in seen.items()}


def is_plain(layer: nn.Module, site: Site) -> bool:
    """Whether no linear of a site has a bias or is an expert's."""
    return not site.experts and all(linear_at(layer, path).bias is None for path in site.linears)


def _served(
    layer: nn.Module, sites: Mapping[str, Site], site: Site, target: Target
) -> dict[str, Any]:
    """What runs transforms of a site, and what they cost, when what can be merged is merged."""
    merging = can_merge(layer, sites, site) and merges(layer, site)
    plain = is_plain(layer, site)

    def online(transform: Transform) -> Transform:
        return split_diagonal(transform)[1] if merging else transform

    return {
        "runs": lambda transform: runs(online(transform), target, plain=plain),
        "stock": lambda transform: runs(online(transform), Target.VLLM_EMULATION, plain=plain),
        "multiply_adds": lambda transform: online(transform).multiply_adds,
    }


def _rounded(recipe: Recipe, weight: Tensor, hessian: Callable[[], Tensor]) -> Tensor:
    return dequantize(recipe.rounding.round(weight, hessian, recipe.scale_rule))


def _joined_(first: SiteStatistics, last: SiteStatistics) -> SiteStatistics:
    tokens = first.tokens + last.tokens
    moment = first.second_moment
    if moment is not None and last.second_moment is not None:
        moment.mul_(first.tokens / tokens).add_(last.second_moment, alpha=last.tokens / tokens)
    return replace(
        first, tokens=tokens, second_moment=moment, amax=first.amax.max(last.amax), judgement=None
    )
