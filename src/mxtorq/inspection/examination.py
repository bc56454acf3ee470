"""A model inspected as a whole: load, capture, measure each site under each method, rank the harm.

Methods that merge rotations into the whole model get a copy of it, rotated, and a pass of their
own; all others share one pass. `identity`, the site as it is, is always measured: it is "before".
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches

from torch import nn

from mxtorq.beginnings import calibrate, evaluation_data, load_model, silent, versions
from mxtorq.calibration.data import Windows
from mxtorq.choosing import require_windows
from mxtorq.config import EvaluationPlan, Recipe, method_name
from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.inspection.harm import harms
from mxtorq.inspection.measures import LongRow
from mxtorq.inspection.survey import Key, SurveyedLayer, survey
from mxtorq.loading.source import Source
from mxtorq.models.family import Family, Site
from mxtorq.quantization import Progress, choose_rotations, merge_rotations_
from mxtorq.reports.inspection import Harm, Inspection, SiteRecord, Token
from mxtorq.surgery.fuse import require_fit
from mxtorq.surgery.linear import linear_at
from mxtorq.surgery.network import network_shape
from mxtorq.transforms.base import TransformMethod
from mxtorq.transforms.rotation import IdentityMethod

IDENTITY = "identity"


def inspect(
    model: str,
    recipes: Sequence[Recipe],
    *,
    sites: Sequence[str] = (),
    harm: EvaluationPlan | None = None,
    device: str = "auto",
    family: Family | None = None,
    progress: Progress = silent,
) -> Inspection:
    """Measure the imbalances of a model before and after the transform of each recipe.

    Args:
        model: a folder, a hub id, or ``reference``; unquantized.
        recipes: what to compare, alike but for their method; the rounding is not used.
        sites: kinds (``down_in``) or full names; all unless given.
        harm: quantize one site at a time too, and evaluate on this.
        device: where it computes.
        family: one of your own (see `mxtorq.models`).
        progress: told how far it is.

    Raises:
        MxtorqError: with what to do; what cannot work is refused before any work.
    """
    first, rule = require_alike(recipes)
    methods: dict[str, TransformMethod] = {IDENTITY: IdentityMethod()}
    methods |= {method_name(recipe.method): recipe.method for recipe in recipes}
    rotating = {name: method for name, method in methods.items() if method.rotates}
    whole = bool(rotating) or harm is not None or first.outliers is not None
    progress("load", 0, 2)
    source = load_model(model, first.outliers, first.seed, device, family, at_rest=not whole)
    for method in methods.values():
        method.check(network_shape(source.model, source.family))
    unfit = require_fit(source.model, source.family, first.allow_unfit)
    wanted = chosen_sites(source, sites, unfit)
    progress("load", 1, 2)
    windows = calibrate(source, first)
    for method in methods.values():
        require_windows(method, len(windows.ids))
    text = None if harm is None else evaluation_data(source, harm)
    progress("load", 2, 2)

    passes = [(source, {n: m for n, m in methods.items() if n not in rotating})]
    passes += [(source, {name: method}) for name, method in rotating.items()]
    layers: list[SurveyedLayer] = []
    found: list[Harm] = []
    for number, (original, here) in enumerate(passes):
        title = "measure" if not number else f"measure {next(iter(here))}"
        subject = original if not number else rotated(original, windows, first, here, progress)
        kept: dict[Key, dict[str, nn.Module]] = {}
        surveyed = survey(
            subject, windows.ids, here, wanted, rule, first.seed, replacements=text is not None
        )
        total = network_shape(source.model, source.family).layers
        progress(title, 0, total)
        for layer in surveyed:
            layers.append(layer)
            kept |= layer.replacements
            progress(title, layer.index + 1, total)
        if text is not None:
            found += harms(
                subject.model,
                source.model,
                kept,
                text.ids,
                lambda done, total: progress("one site at a time", done, total),
            )
    plain = layers[: len(layers) // len(passes)]
    return Inspection(
        model=source.name,
        family=source.family.name,
        methods=list(methods),
        scale_rule=rule.value,
        seed=first.seed,
        outliers=first.outliers,
        calibration=windows.record(),
        sites=list(records(source, windows, list(methods), wanted, layers, plain)),
        residual_tokens={
            f"{source.family.layers}.{layer.index}": tokens(source, windows, layer.residual)
            for layer in plain
        },
        harm=sorted(found, key=lambda each: -each.kl),
        evaluation=None if text is None else text.record(),
        unfit=unfit,
        versions=versions(),
    )


def require_alike(recipes: Sequence[Recipe]) -> tuple[Recipe, ScaleRule]:
    """The first of recipes that differ in their method only, and their scale rule.

    Raises:
        UsageError: there is none, they differ in more, or their scales are none of OCP's.
    """
    if not recipes or any(replace(r, method=recipes[0].method) != recipes[0] for r in recipes):
        raise UsageError(
            asked="an inspection",
            found=f"{len(recipes)} recipes" if recipes else "no recipe",
            why="methods are compared on the same inputs under the same scales",
            todo="pass recipes that differ in their method alone, at least one",
        )
    rule = recipes[0].scale_rule
    if not isinstance(rule, ScaleRule):
        raise UsageError(
            asked=f"an inspection under {rule.value} scales",
            found="a scale that is no power of two",
            why="codes, cuts and exponents are counted as MXFP4 stores them",
            todo="choose one of " + ", ".join(ScaleRule),
        )
    return recipes[0], rule


def chosen_sites(source: Source, asked: Sequence[str], unfit: dict[str, int]) -> list[str]:
    """The full names of the sites that were asked for, by kind or by name, in the model's order.

    Raises:
        UsageError: there is no such site, or it is one that stays in BF16.
    """
    named = {name: site for name, _, site in every_site(source)}
    kinds = dict.fromkeys(site.name.value for site in named.values())
    for name in asked:
        if name not in named and name not in kinds:
            near = get_close_matches(name, [*kinds, *named], 1, cutoff=0.4)
            raise UsageError(
                asked=f"the site {name!r}",
                found=f"{', '.join(kinds)}, and full names such as {next(iter(named))}",
                why="no other site exists in this model",
                todo=f"did you mean {near[0]!r}?" if near else "name one of those",
            )
    chosen = [name for name, site in named.items() if not asked or {name, site.name} & {*asked}]
    if unfit.keys() >= set(chosen):
        raise UsageError(
            asked=f"the sites {', '.join(asked)}",
            found=", ".join(f"{name} (width {unfit[name]})" for name in chosen[:4]),
            why="32 divides none of these widths, so they stay in BF16",
            todo="name another site",
        )
    return [name for name in chosen if name not in unfit]


def every_site(source: Source) -> Iterator[tuple[str, int, Site]]:
    """Full name, layer and site of all sites of a model."""
    family = source.family
    for index, _ in enumerate(source.model.get_submodule(family.layers).children()):
        for site in family.sites:
            yield family.site_name(index, site), index, site


def rotated(
    source: Source,
    windows: Windows,
    recipe: Recipe,
    method: dict[str, TransformMethod],
    progress: Progress,
) -> Source:
    """A copy of a model with the rotations of one method merged into it."""
    copied = replace(source, model=copy.deepcopy(source.model))
    (chosen,) = method.values()
    asked = replace(recipe, method=chosen)
    unfit = require_fit(copied.model, copied.family, recipe.allow_unfit)
    merge_rotations_(copied, choose_rotations(copied, windows.ids, asked, progress), unfit)
    return copied


def records(
    source: Source,
    windows: Windows,
    methods: list[str],
    wanted: Sequence[str],
    layers: Sequence[SurveyedLayer],
    plain: Sequence[SurveyedLayer],
) -> Iterator[SiteRecord]:
    """What was found at each site, methods in the order in which they were asked for."""
    pairs = {key: pair for layer in layers for key, pair in layer.pairs.items()}
    lengths = {name: rows for layer in plain for name, rows in layer.lengths.items()}
    decoder = list(source.model.get_submodule(source.family.layers).children())
    for name, index, site in every_site(source):
        if name in wanted:
            yield SiteRecord(
                site=name,
                kind=site.name.value,
                width=linear_at(decoder[index], site.linears[0]).in_features,
                linears=[source.family.linear_name(index, path) for path in site.linears],
                massive_tokens=tokens(source, windows, lengths.get(name, [])),
                methods={method: pairs[name, method] for method in methods},
            )


def tokens(source: Source, windows: Windows, rows: Sequence[LongRow]) -> list[Token]:
    """Where long rows stand in the text, and what they are."""
    found = []
    for row in rows:
        window, position = divmod(row.index, windows.ids.shape[1])
        text = source.tokenizer.decode([int(windows.ids[window, position])])
        found.append(Token(window=window, position=position, text=text, ratio=row.ratio))
    return found
