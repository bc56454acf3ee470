"""Methods and roundings by name, with options: ``torq:levels=inter``, ``gptq:order=backward``.

NAME is a key of a table or an importable ``package.module:Class`` of your own, which takes options
in the same way; a model family is an object and so takes none. Unknown names, options and values
are errors with the nearest known one. The same options stand in TOML as a table with a ``name``.
"""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from inspect import isabstract
from typing import Any, get_type_hints

from mxtorq.errors import UsageError


def parse(what: str, spec: str, table: Mapping[str, type[Any]], base: type[Any]) -> Any:
    """The object that a string names; ``what`` is how errors call it.

    Raises:
        UsageError: unknown name, option or value.
    """
    name, *rest = spec.strip().split(":")
    if "." in name and rest:
        name, rest = f"{name}:{rest[0]}", rest[1:]
    options: dict[str, Any] = {}
    for item in rest:
        option, separator, text = item.partition("=")
        if not separator:
            names = {f"{field.name}=" for field in fields(_factory(what, name, table, base))}
            raise unknown(f"option of {name!r}", item, names)
        options[option] = text
    return build(what, name, options, table, base)


def build(
    what: str,
    name: str,
    options: Mapping[str, Any],
    table: Mapping[str, type[Any]],
    base: type[Any],
) -> Any:
    """The object of that name with options as TOML values or as strings.

    Raises:
        UsageError: unknown name, option or value.
    """
    factory = _factory(what, name, table, base)
    known = get_type_hints(factory)
    allowed = {field.name for field in fields(factory)}
    for option in options:
        if option not in allowed:
            raise unknown(f"option of {name!r}", option, allowed)
    return factory(**{o: _value(f"{name}:{o}", v, known[o]) for o, v in options.items()})


def find(what: str, name: str, table: Mapping[str, Any], kind: type[Any]) -> Any:
    """The object that a table or ``package.module:NAME`` holds, taken as it is.

    Raises:
        UsageError: there is none of that name or kind.
    """
    found = table[name] if name in table else _imported(what, name, table)
    if not isinstance(found, kind):
        raise UsageError(
            asked=f"the {what} {name}",
            found=f"a {type(found).__name__}",
            why=f"it is no {kind.__name__} of mxtorq",
            todo=f"name an object of {kind.__module__}.{kind.__name__}",
        )
    return found


def spell(chosen: Any, table: Mapping[str, type[Any]]) -> str:
    """The string that `parse` turns into this object: options that differ from their defaults."""
    changed = [
        f"{field.name}={_text(getattr(chosen, field.name))}"
        for field in fields(chosen)
        if field.default is MISSING or getattr(chosen, field.name) != field.default
    ]
    return ":".join([name_of(chosen, table), *changed])


def name_of(chosen: Any, table: Mapping[str, type[Any]]) -> str:
    """The name alone."""
    kind = type(chosen)
    names = {factory: name for name, factory in table.items()}
    return names.get(kind, f"{kind.__module__}:{kind.__qualname__}")


def options_of(chosen: Any) -> dict[str, Any]:
    """All options with their values, as plain JSON values."""
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(chosen).items()}


def unknown(what: str, name: str, known: Any) -> UsageError:
    """The error for a name that is not in a table, with the nearest one that is."""
    names = sorted(str(each) for each in known)  # an enum's members as well
    near = nearest(name, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(
        asked=f"the {what} {name!r}",
        found=f"{', '.join(names) or 'none'}",
        why=f"no other {what} exists here",
        todo=f"{hint}name one of those",
    )


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names that look most like this one, best first; none where none does."""
    return get_close_matches(name, list(known), n=most, cutoff=0.4)


def _factory(what: str, name: str, table: Mapping[str, type[Any]], base: type[Any]) -> Any:
    if name in table:
        return table[name]
    factory = _imported(what, name, table)
    fits = isinstance(factory, type) and issubclass(factory, base)
    if not fits or isabstract(factory) or not is_dataclass(factory):
        raise UsageError(
            asked=f"the {what} {name}",
            found=f"{factory!r:.200}",
            why=f"it is no dataclass that is a complete subclass of mxtorq's {base.__name__}",
            todo=f"derive your class from {base.__module__}.{base.__name__}",
        )
    return factory


def _imported(what: str, name: str, table: Mapping[str, Any]) -> Any:
    module, separator, attribute = name.partition(":")
    if not separator:
        raise unknown(what, name, table)
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module can raise anything while it is imported
        raise UsageError(
            asked=f"the {what} {name}",
            found=f"{type(error).__name__}: {error}",
            why="it cannot be imported",
            todo=f"install the package that holds it, or use one of {', '.join(table)}",
        ) from error


def _value(what: str, value: Any, kind: type) -> Any:
    try:
        if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[value]
        if (kind in (int, str) and not isinstance(value, (kind, str))) or isinstance(value, bool):
            raise ValueError(value)
        return kind(value)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        expected = (
            ", ".join(kind) if issubclass(kind, str) and issubclass(kind, Enum) else kind.__name__
        )
        raise UsageError(
            asked=f"{what}={value}",
            found=f"the value {value!r}",
            why=f"expected: {expected}",
            todo="correct the value",
        ) from error


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value.value if isinstance(value, Enum) else value)
