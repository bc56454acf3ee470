"""What one run is asked to do: frozen recipes and plans, and their TOML.

    method = "torq"                 or a table: [method] name = "torq", levels = "inter"
    rounding = "gptq"               likewise; without it what the method is made for
    scale_rule = "floor"
    ...                             every other field of `Recipe` under its own name
    [evaluation]                    optional: the fields of `EvaluationPlan`

Unknown keys, names and values are errors with the nearest known one. Nothing is adjusted.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from mxtorq import specs
from mxtorq.errors import UsageError
from mxtorq.export.targets import Target
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import NonOCPScale, Scale, is_ocp
from mxtorq.models import FAMILIES
from mxtorq.models.family import Family
from mxtorq.reading.documents import Refusal, read_text
from mxtorq.rounding import ROUNDINGS
from mxtorq.rounding.base import Rounding
from mxtorq.rounding.rtn import RTN
from mxtorq.transforms import METHODS
from mxtorq.transforms.base import TransformMethod

_LONGEST = 2**16
"""Bytes of a recipe; nested keys of a long one take quadratic time to parse."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized. Validated at birth, never adjusted.

    Without ``rounding`` weights are rounded to nearest; `recipe_from` takes the method's usual one.
    """

    method: TransformMethod
    rounding: Rounding = field(default_factory=RTN)
    scale_rule: Scale = ScaleRule.FLOOR
    """Of weights, and of activations unless the target has a rule of its own. A `NonOCPScale` can
    be evaluated and not be written."""
    target: Target = Target.MXTORQ
    """Who will run it."""
    calibration: str = "stdlib"
    """FILE or NAME, see `calibration.data`."""
    calibration_tokens: int = 65_536
    """Whole windows of ``seqlen`` are used: the remainder of the division is not."""
    seqlen: int | None = None
    """None: 2048, or what the model was made for when that is less."""
    seed: int = 0
    outliers: str | None = None
    """A profile of `surgery.outliers` that the model's channels are rescaled by first."""
    allow_unfit: bool = False
    """Sites whose width is no multiple of 32 stay in BF16 instead of stopping the run."""

    def __post_init__(self) -> None:
        require_positive("calibration_tokens", self.calibration_tokens)
        require_positive("seqlen", self.seqlen)
        if not 0 <= self.seed < 2**63:
            raise UsageError(
                asked=f"seed = {self.seed}",
                found="a number outside of 0 to 2^63 - 1",
                why="the generators take no other seed",
                todo="pass a small whole number",
            )
        self.rounding.check(self.scale_rule)
        if self.target.card.activations is not None and not is_ocp(self.scale_rule):
            raise UsageError(
                asked=f"{self.scale_rule.value} scales for the target {self.target.value}",
                found=f"weights outside of the format and activations under "
                f"{self.target.card.activations.value}",
                why="weights and activations are either both MXFP4 or both outside of the format",
                todo="choose one of " + ", ".join(ScaleRule) + ", or the target mxtorq",
            )
        if self.method.needs_compensation and not self.rounding.compensates:
            raise UsageError(
                asked=f"{method_name(self.method)} with {rounding_name(self.rounding)}",
                found="a method that counts on later errors being made good in earlier columns",
                why="this rounding fixes every weight by itself, so the method would optimise "
                "something that does not happen",
                todo="choose rounding gptq, or another option of the method",
            )

    @property
    def activation_rule(self) -> Scale:
        """The scale rule of activations."""
        return self.target.card.activations or self.scale_rule

    def to_dict(self) -> dict[str, Any]:
        """Every choice as plain JSON values: two runs with equal dictionaries ask for the same."""
        return {
            "method": {
                "name": specs.name_of(self.method, METHODS),
                **specs.options_of(self.method),
            },
            "rounding": {
                "name": specs.name_of(self.rounding, ROUNDINGS),
                **specs.options_of(self.rounding),
            },
            "scale_rule": self.scale_rule.value,
            "target": self.target.value,
            "calibration": self.calibration,
            "calibration_tokens": self.calibration_tokens,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "outliers": self.outliers,
            "allow_unfit": self.allow_unfit,
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """On what a model is evaluated."""

    text: str = "stdlib"
    eval_tokens: int | None = None
    """None: all whole windows of the text."""
    seqlen: int | None = None

    def __post_init__(self) -> None:
        require_positive("eval_tokens", self.eval_tokens)
        require_positive("seqlen", self.seqlen)


def parse_method(spec: str) -> TransformMethod:
    """The method that ``NAME:option=value:...`` names. Raises `UsageError`."""
    method: TransformMethod = specs.parse("method", spec, METHODS, TransformMethod)
    return method


def parse_rounding(spec: str) -> Rounding:
    """The way of rounding that ``NAME:option=value:...`` names. Raises `UsageError`."""
    rounding: Rounding = specs.parse("rounding", spec, ROUNDINGS, Rounding)
    return rounding


def parse_scale(name: str) -> Scale:
    """The scale rule of that name, OCP's or not. Raises `UsageError`."""
    for kind in (ScaleRule, NonOCPScale):
        if name in list(kind):
            return kind(name)
    raise specs.unknown("scale rule", name, [*ScaleRule, *NonOCPScale])


def parse_target(name: str) -> Target:
    """The target of that name. Raises `UsageError`."""
    if name in list(Target):
        return Target(name)
    raise specs.unknown("target", name, list(Target))


def parse_family(name: str | None) -> Family | None:
    """The family of that name, or the one that ``package.module:NAME`` is. Raises `UsageError`."""
    return None if name is None else specs.find("family", name, FAMILIES, Family)


def method_name(method: TransformMethod) -> str:
    """The string that `parse_method` turns into this method."""
    return specs.spell(method, METHODS)


def rounding_name(rounding: Rounding) -> str:
    """The string that `parse_rounding` turns into this way of rounding."""
    return specs.spell(rounding, ROUNDINGS)


def recipe_from(settings: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values: names as strings, or as tables with ``name`` and options.

    Without a rounding it gets the method's usual one.

    Raises:
        UsageError: an unknown key, name or value; no method.
    """
    _require_known("key of a recipe", settings, Recipe)
    if "method" not in settings:
        raise UsageError(
            asked="a recipe",
            found=f"the keys {', '.join(settings) or 'none'}",
            why="it does not say which method transforms the inputs",
            todo=f'add `method = "mxtorq"`, or one of {", ".join(METHODS)}',
        )
    values = dict(settings)
    values["method"] = _object("method", values["method"], METHODS, TransformMethod)
    rounding = values.get("rounding", values["method"].usual_rounding)
    values["rounding"] = _object("rounding", rounding, ROUNDINGS, Rounding)
    if "scale_rule" in values:
        values["scale_rule"] = parse_scale(str(values["scale_rule"]))
    if "target" in values:
        values["target"] = parse_target(str(values["target"]))
    _require_types(values, Recipe)
    return Recipe(**values)


def with_budget(recipe: Recipe, budget: int | None) -> Recipe:
    """The recipe whose method may cost that many multiply-adds a token and channel at run time.

    Raises:
        UsageError: the method has no option ``budget``.
    """
    if budget is None:
        return recipe
    if "budget" not in specs.options_of(recipe.method):
        raise UsageError(
            asked=f"a budget of {budget} for {method_name(recipe.method)}",
            found="a method without a budget",
            why="it has one transform for a site, and that costs what it costs",
            todo="leave the budget out, or choose the method mxtorq, which takes the best "
            "transform within it",
        )
    return replace(recipe, method=replace(recipe.method, budget=budget))


def plan_from(settings: Mapping[str, Any]) -> EvaluationPlan:
    """A plan from plain values. Raises `UsageError` as `recipe_from`."""
    _require_known("key of [evaluation]", settings, EvaluationPlan)
    _require_types(settings, EvaluationPlan)
    return EvaluationPlan(**settings)


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a recipe file, and those of its [evaluation] table, unchecked.

    Raises:
        UsageError: there is no such file, or it is no TOML.
    """
    refuse = Refusal(
        kind=UsageError,
        asked=f"the recipe {path}",
        why="a recipe is a TOML file",
        todo="correct the file, or start from one of those in recipes/",
    )
    text = read_text(path, _LONGEST, refuse)
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError
        raise refuse(f"{type(error).__name__}: {error}") from error
    evaluation = content.pop("evaluation", {})
    if not isinstance(evaluation, dict):
        raise refuse(f"evaluation = {evaluation!r:.200}", "[evaluation] is a table")
    return content, evaluation


def to_toml(recipe: Recipe, plan: EvaluationPlan | None = None) -> str:
    """A recipe, and maybe a plan, as a file that `read_settings` reads back."""
    choices = recipe.to_dict()
    tables = {k: v for k, v in choices.items() if isinstance(v, dict)}
    lines = [_line(k, v) for k, v in choices.items() if k not in tables and v is not None]
    if plan is not None:
        tables["evaluation"] = {k: v for k, v in asdict(plan).items() if v is not None}
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(_line(k, v) for k, v in table.items())]
    return "\n".join(lines) + "\n"


def require_ocp(scale: Scale) -> None:
    """Refuse to write what no hardware reads.

    Raises:
        UsageError: it is a non-OCP scale.
    """
    if not is_ocp(scale):
        raise UsageError(
            asked=f"a checkpoint with {scale.value} scales",
            found="a scale that is no power of two",
            why="MXFP4 stores E8M0 scales, and no engine or hardware could run it",
            todo="evaluate it with `mxtorq compare`, or choose one of " + ", ".join(ScaleRule),
        )


def require_positive(name: str, value: int | None) -> None:
    """Raises:
    UsageError: the value is given and below one.
    """
    if value is not None and value < 1:
        raise UsageError(
            asked=f"{name} = {value}",
            found="a number below 1",
            why="a run needs at least one token",
            todo="pass a positive number",
        )


def _object(what: str, value: Any, table: Mapping[str, type[Any]], base: type[Any]) -> Any:
    if isinstance(value, base):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        options = {k: v for k, v in value.items() if k != "name"}
        return specs.build(what, value["name"], options, table, base)
    return specs.parse(what, str(value), table, base)


def _require_known(what: str, settings: Mapping[str, Any], kind: type[Any]) -> None:
    names = {each.name for each in fields(kind)}
    for key in settings:
        if key not in names:
            raise specs.unknown(what, key, names)


def _require_types(values: Mapping[str, Any], kind: type[Any]) -> None:
    hints = get_type_hints(kind)
    for key, value in values.items():
        # bool is an int to Python, but `seed = true` is a mistake.
        if not isinstance(value, hints[key]) or (
            isinstance(value, bool) and hints[key] is not bool
        ):
            expected = getattr(hints[key], "__name__", str(hints[key]))
            raise UsageError(
                asked=f"{key} = {value!r}",
                found=f"a value of type {type(value).__name__}",
                why=f"expected: {expected}",
                todo="correct the value",
            )


def _line(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"{key} = {str(value).lower()}"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key} = "{escaped}"'
    return f"{key} = {value!r}"
