"""Front matter gives what is surely there and nothing else."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxtorq.reading.front_matter import front_matter


def card(*lines: str) -> str:
    return "\n".join(["---", *lines, "---", "# A model", "license: mit"])


def test_strings_and_lists_of_them() -> None:
    text = card(
        "license: other  # as Meta calls it",
        "license_name: 'llama3.1'",
        'license_link: "https://example.org/LICENSE"',
        "base_model:",
        "- meta-llama/Llama-3.1-8B",
        "  - a/b",
        "language: [en, 'de']",
        "",
        "# a comment",
        "tags:",
    )
    assert front_matter(text) == {
        "license": ["other"],
        "license_name": ["llama3.1"],
        "license_link": ["https://example.org/LICENSE"],
        "base_model": ["meta-llama/Llama-3.1-8B", "a/b"],
        "language": ["en", "de"],
    }


def test_windows_and_a_byte_order_mark() -> None:
    assert front_matter("\ufeff---\r\nlicense: mit\r\n---\r\n") == {"license": ["mit"]}


@pytest.mark.parametrize(
    "text", ["", "---", "---\nlicense: mit", "license: mit", " ---\na: b\n---"]
)
def test_there_is_none(text: str) -> None:
    assert front_matter(text) == {}


@pytest.mark.parametrize(
    "lines",
    [
        ("license: mit", "license: apache-2.0"),
        ("license: null",),
        ("license: no",),
        ("license: |", "  mit"),
        ("license: >-", "  mit"),
        ("license:", "  name: mit"),
        ("license:", "- name: mit"),
        ("license: mit", "  and more"),
        ("license: &anchor mit",),
        ("license: *anchor",),
        ("license: !!python/object:os.system mit",),
        ("license: {name: mit}",),
        ("license: [mit, {}]",),
        ("license: mit: more",),
        ('license: "mi\\t"',),
        ("license: 'mit",),
        ("license: <b>mit</b>",),
        ("license: mït",),
        ("license: " + "x" * 400,),
    ],
)
def test_what_is_not_understood_says_nothing(lines: tuple[str, ...]) -> None:
    assert front_matter(card("a: b", *lines, "c: d")) == {"a": ["b"], "c": ["d"]}


_VALUES = st.text("abcdefgh0123456789./-+ ", min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.from_regex("[a-z_]{1,9}", fullmatch=True), _VALUES | st.lists(_VALUES)))
def test_a_yaml_reader_agrees(content: dict[str, Any]) -> None:
    """Whatever is found is what YAML means, if that is a string at all."""
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    text = yaml.safe_dump(content, sort_keys=False)
    for key, values in front_matter(f"---\n{text}---\n").items():
        meant = content[key] if isinstance(content[key], list) else [content[key]]
        assert values == meant


@settings(max_examples=50, deadline=None)
@given(st.text("-ab:#[]{}'\"|>&*! \n\t,", max_size=80))
def test_any_text_is_read(text: str) -> None:
    for values in front_matter(f"---\n{text}\n---\n").values():
        assert values
        assert all(isinstance(value, str) and "\n" not in value for value in values)
