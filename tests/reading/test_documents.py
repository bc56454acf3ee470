"""Foreign text is bounded and strict, and values have the types that a dataclass says."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mxtorq.errors import CheckpointError, MxtorqError
from mxtorq.reading.documents import (
    Refusal,
    conforms,
    fields_of,
    parse_json,
    parse_object,
    read_text,
)

REFUSE = Refusal(kind=CheckpointError, asked="a file", why="it is odd", todo="look at it")


def test_a_refusal_has_four_parts_and_a_limit() -> None:
    error = REFUSE("x" * 10_000)
    assert (error.asked, error.why, error.todo) == ("a file", "it is odd", "look at it")
    assert len(error.found) < 1000
    assert REFUSE("x", "another reason").why == "another reason"
    assert type(error) is CheckpointError


def test_text_is_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("grün\n", encoding="utf-8")
    assert read_text(path, 6, REFUSE) == "grün\n"
    with pytest.raises(CheckpointError, match=r"up to 0\.0 MB"):
        read_text(path, 5, REFUSE)


def test_what_is_no_regular_text_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("pipe", "endless", ".", "none", "a\0b", "n" * 300, "\ud800", "bytes"):
        with pytest.raises(CheckpointError):
            read_text(tmp_path / name, 100, REFUSE)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2.5, null]", [1, 2.5, None]),
        ('{"a": {"b": []}}', {"a": {"b": []}}),
        (r'"\ud83d\ude00"', "\U0001f600"),
        (r'"\\ud800"', r"\ud800"),
        ("-Infinity", float("-inf")),
    ],
)
def test_json(text: str, value: object) -> None:
    assert parse_json(text, REFUSE) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"a":' * 100_000, "RecursionError"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' stands there twice"),
        (r'{"text": "\uD83D"}', "surrogate"),
        ("9" * 5000, "ValueError"),
    ],
)
def test_odd_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_json(text, REFUSE)


def test_an_object_is_an_object() -> None:
    assert parse_object("{}", REFUSE) == {}
    with pytest.raises(CheckpointError, match="JSON of type list"):
        parse_object("[]", REFUSE)


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, int, True),
        (True, int, False),
        (2**63, int, False),
        (-(2**63), int, True),
        (1.0, int, False),
        (1, float, True),
        (2**63, float, False),
        (float("nan"), float, True),
        (False, float, False),
        (True, bool, True),
        ("x", str, True),
        (None, str | None, True),
        (None, None, True),
        (1, str | None, False),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ((1,), list[int], False),
        ({"a": 1}, dict[str, float], True),
        ({"a": "1"}, dict[str, float], False),
        ({"a": {"b": 1}}, dict[str, dict[str, Any]], True),
        ({"a": [1]}, dict[str, dict[str, Any]], False),
        (object(), Any, True),
    ],
)
def test_types_of_json(value: object, hint: object, fits: bool) -> None:
    assert conforms(value, hint) is fits


@dataclass(frozen=True, kw_only=True)
class Card:
    number: int
    names: list[str] = field(default_factory=list)
    size: float = 0.0
    sizes: dict[str, float] = field(default_factory=dict)
    maybe: float | None = None


def test_fields_of_a_dataclass() -> None:
    assert fields_of({"number": 3}, Card, REFUSE, "a card") == {"number": 3}
    whole = {"number": 3, "names": ["x"], "size": 2, "sizes": {"a": 1}, "maybe": 5}
    found = fields_of(whole, Card, REFUSE, "a card")
    assert found == whole
    floats = (found["size"], found["sizes"]["a"], found["maybe"])
    assert [type(each) for each in floats] == [float] * 3
    assert type(found["number"]) is int
    assert fields_of({"number": 3, "maybe": None}, Card, REFUSE, "a card")["maybe"] is None
    for values, message in (
        ({}, r"a card with missing or unknown fields \['number'\]"),
        ({"number": 3, "other": 4}, r"\['other'\]"),
        ({"number": "3"}, "number is of type int"),
        ({"number": 3, "names": [3]}, r"names is of type list\[str\]"),
        ([3], "a card of type list"),
    ):
        with pytest.raises(MxtorqError, match=message):
            fields_of(values, Card, REFUSE, "a card")
