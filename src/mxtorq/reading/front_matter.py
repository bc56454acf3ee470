"""The front matter of a model card: what the hub's README.md files say between two lines ``---``.

It is YAML, of which licence and origin need one part: plain or quoted strings at the top level, and
lists of them. That part is read here. A key with anything else under it (tables, block texts,
anchors, another key of the same name) has no value here, so a text that is not understood says
nothing instead of something wrong. Nothing is executed, expanded or refused.
"""

import re

_KEY = re.compile(r"([A-Za-z_][\w-]*):(?:[ \t]+(.*))?")
_ITEM = re.compile(r"[ \t]*-[ \t]+(.*)")
_SCALAR = re.compile(r"[A-Za-z0-9](?:[\w./+@%~?&=, ()-]|:(?! )){0,299}", re.ASCII)
_NO_STRING = {"null", "true", "false", "yes", "no", "on", "off"}


def front_matter(text: str) -> dict[str, list[str]]:
    """The strings of each key of a card's front matter; a single one is a list, too."""
    lines = [line.rstrip() for line in text.removeprefix("\ufeff").split("\n")]
    if lines[0] != "---" or "---" not in lines[1:]:
        return {}
    found: dict[str, list[str] | None] = {}
    key, open_list = "", False
    for line in lines[1 : lines.index("---", 1)]:
        if not line or line.lstrip().startswith("#"):
            continue
        if match := _KEY.fullmatch(line):
            again, key, rest = match[1] in found, match[1], _uncommented(match[2] or "")
            values = _values(rest)
            found[key] = None if again else values
            open_list = not again and rest == ""
        elif (match := _ITEM.fullmatch(line)) and open_list:
            item, sofar = _scalar(_uncommented(match[1])), found[key]
            found[key] = None if item is None or sofar is None else [*sofar, item]
        elif key:
            found[key] = None
    return {name: values for name, values in found.items() if values}


def _values(text: str) -> list[str] | None:
    if text == "":
        return []
    listed = text.startswith("[") and text.endswith("]")
    parts = [_scalar(part.strip()) for part in (text[1:-1].split(",") if listed else [text])]
    return None if None in parts else [part for part in parts if part is not None]


def _uncommented(text: str) -> str:
    return re.sub(r"(^|\s)#.*", "", text).strip()


def _scalar(text: str) -> str | None:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    inner = text[1:-1] if quoted else text
    if (
        not _SCALAR.fullmatch(inner)
        or inner[-1] == " "
        or (not quoted and inner.lower() in _NO_STRING)
    ):
        return None
    return inner
