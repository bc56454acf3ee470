"""What one run is asked to do: frozen recipes, and the strings that name methods in them.

A method is written ``NAME`` or ``NAME:option=value:option=value``: ``torq``, ``torq:levels=inter``.
NAME is a key of `transforms.METHODS` or an importable ``package.module:Class`` of your own, which
takes options in the same way. Unknown names and options are errors with the nearest known one.
"""

import importlib
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from enum import Enum
from typing import Any, get_type_hints

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.rounding import ROUNDINGS
from mxtorq.transforms import METHODS
from mxtorq.transforms.base import TransformMethod


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized. Validated at birth, never adjusted."""

    method: TransformMethod
    rounding: str = "rtn"
    scale_rule: ScaleRule = ScaleRule.FLOOR
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
        if self.rounding not in ROUNDINGS:
            raise unknown("rounding", self.rounding, ROUNDINGS)
        require_positive("calibration_tokens", self.calibration_tokens)
        require_positive("seqlen", self.seqlen)


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
    """The method that a string names.

    Raises:
        UsageError: unknown name, option or value.
    """
    name, *rest = spec.strip().split(":")
    if name in METHODS:
        factory: Any = METHODS[name]
    elif "." in name and rest:
        factory, rest = _imported(name, rest[0]), rest[1:]
    else:
        raise unknown("method", name, METHODS)
    known = get_type_hints(factory)
    allowed = {field.name for field in fields(factory)}
    chosen: dict[str, Any] = {}
    for item in rest:
        option, separator, text = item.partition("=")
        if option not in allowed or not separator:
            raise unknown(f"option of {name!r}", item, {f"{o}=": None for o in allowed})
        chosen[option] = _value(f"{name}:{option}", text, known[option])
    method: TransformMethod = factory(**chosen)
    return method


def method_name(method: TransformMethod) -> str:
    """The string that `parse_method` turns into this method, with options that differ from their
    defaults only."""
    kind = type(method)
    names = {factory: name for name, factory in METHODS.items()}
    name = names.get(kind, f"{kind.__module__}:{kind.__qualname__}")
    changed = [
        f"{field.name}={_text(getattr(method, field.name))}"
        for field in fields(method)
        if field.default is MISSING or getattr(method, field.name) != field.default
    ]
    return ":".join([name, *changed])


def method_options(method: TransformMethod) -> dict[str, Any]:
    """All options with their values, as plain JSON values."""
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(method).items()}


def unknown(what: str, name: str, known: Any) -> UsageError:
    """The error for a name that is not in a table, with the nearest one that is."""
    names = sorted(str(each) for each in known)  # an enum's members as well
    near = get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(
        asked=f"the {what} {name!r}",
        found=f"{', '.join(names) or 'none'}",
        why=f"no other {what} exists here",
        todo=f"{hint}name one of those",
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


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            asked=f"the method {module}:{name}",
            found=f"{type(error).__name__}: {error}",
            why="it cannot be imported",
            todo=f"install the package that holds it, or use one of {', '.join(METHODS)}",
        ) from error


def _value(what: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text]
        return kind(text)
    except (ValueError, KeyError) as error:
        expected = (
            ", ".join(kind) if issubclass(kind, str) and issubclass(kind, Enum) else kind.__name__
        )
        raise UsageError(
            asked=f"{what}={text}",
            found=f"the value {text!r}",
            why=f"expected: {expected}",
            todo="correct the value",
        ) from error


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value.value if isinstance(value, Enum) else value)
