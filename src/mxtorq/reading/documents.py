"""Text and JSON from files that nobody vouches for: bounded, strict, and refused with our errors.

Python's readers are safe but generous. They take a file of any size, block on a pipe, keep the last
of two equal keys, let escaped halves of surrogate pairs through that no file name and no hash can
encode, and raise `RecursionError` for deep nesting. The functions here read regular files up to a
size and refuse the rest.

Values are checked against the type hints of the dataclass that they go into (`fields_of`), so
that a record with a list in the place of a number stops where it is read and not an hour later.

Memory: JSON values take up to 25 times the bytes of their text (a million empty lists), so a limit
on the size is a limit on the memory.
"""

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mxtorq.errors import MxtorqError

_SHOWN = 500
"""Characters of a foreign text that a message repeats."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The parts of an error that a reader cannot know: whose file it is, and what to do."""

    kind: type[MxtorqError]
    asked: str
    why: str
    """Why a file that breaks any rule is of no use; a rule with a reason of its own gives that."""
    todo: str

    def __call__(self, found: str, why: str | None = None) -> MxtorqError:
        """The error to raise."""
        return self.kind(
            asked=self.asked, found=_shortened(found), why=why or self.why, todo=self.todo
        )


def read_bytes(path: Path, most: int, refuse: Refusal) -> bytes:
    """The content of a regular file of up to ``most`` bytes.

    Raises:
        MxtorqError: it is no such file.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe would block, a device has no end
            raise refuse(f"{path.name}, which is no regular file")
        size = facts.st_size
        if size <= most:
            with path.open("rb") as file:
                content = file.read(size + 1)  # one more: it may grow
            size = len(content)
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a surrogate in the name
        raise refuse(f"{type(error).__name__}: {error}") from error
    if size > most:
        raise refuse(
            f"{path.name} of {size / 1e6:.1f} MB",
            f"such a file has up to {most / 1e6:.1f} MB, and its values take far more",
        )
    return content


def read_text(path: Path, most: int, refuse: Refusal) -> str:
    """The UTF-8 text of a regular file of up to ``most`` bytes. Raises as `read_bytes`."""
    try:
        return read_bytes(path, most, refuse).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(f"{path.name}: {type(error).__name__}: {error}") from error


def parse_json(text: str, refuse: Refusal) -> Any:
    """The value of a JSON text without duplicate keys and with whole surrogate pairs.

    NaN and Infinity are taken, as Python writes them.

    Raises:
        MxtorqError: it is none.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise refuse(f"{type(error).__name__}: {error}") from error
    return value


def parse_object(text: str, refuse: Refusal) -> dict[str, Any]:
    """The JSON object of a text. Raises as `parse_json`."""
    value = parse_json(text, refuse)
    if not isinstance(value, dict):
        raise refuse(f"JSON of type {type(value).__name__}, not an object")
    return value


def conforms(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type: int, float, str, bool, None, Any, lists, dicts, unions.

    A bool is no number here, an integer is a float, and integers have 64 bits.
    """
    if hint is Any:
        return True
    origin, parts = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(conforms(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(conforms(each, parts[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(conforms(each, parts[1]) for each in value.values())
    if hint in (NoneType, None):
        return value is None
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, hint)):
            return False
        return isinstance(value, float) or -(2**63) <= value < 2**63
    return isinstance(value, hint)


def fields_of(values: Any, kind: type[Any], refuse: Refusal, where: str) -> dict[str, Any]:
    """The values that a dataclass of plain JSON fields is made of; integers become floats there.

    Raises:
        MxtorqError: a field is missing, unknown, or of another type than the dataclass says.
    """
    if not isinstance(values, Mapping):
        raise refuse(f"{where} of type {type(values).__name__}, not an object")
    known = {field.name: field for field in fields(kind)}
    needed = {
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING
    }
    wrong = sorted((needed - set(values)) | (set(values) - set(known)))
    if wrong:
        raise refuse(f"{where} with missing or unknown fields {wrong}", "it is not complete")
    hints = get_type_hints(kind)
    require_keys(values, {name: hints[name] for name in values}, refuse, where)
    return {name: _as_float(value, hints[name]) for name, value in values.items()}


def require_keys(
    values: Mapping[str, Any], hints: Mapping[str, Any], refuse: Refusal, where: str
) -> None:
    """Refuse a table without some keys, or with other types under them; it may have further keys.

    Raises:
        MxtorqError: so it is.
    """
    for name, hint in hints.items():
        if name not in values:
            raise refuse(f"{where} without {name}", "it is not complete")
        if not conforms(values[name], hint):
            expected = str(hint) if get_args(hint) else hint.__name__
            raise refuse(
                f"{where} with {name} = {values[name]!r:.200}", f"{name} is of type {expected}"
            )


def _as_float(value: Any, hint: Any) -> Any:
    """A conforming value, 2 as 2.0 where a float belongs: other writers of JSON drop the point."""
    kinds = get_args(hint)
    if get_origin(hint) is dict and isinstance(value, dict):
        return {key: _as_float(each, kinds[1]) for key, each in value.items()}
    if get_origin(hint) is list and isinstance(value, list):
        return [_as_float(each, kinds[0]) for each in value]
    wanted = float in (hint, *(kinds if get_origin(hint) is UnionType else ()))
    return float(value) if wanted and isinstance(value, int) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} stands there twice")
    return table


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
