"""The page of commands, written from the command line itself, so that it cannot go stale.

Names, help texts and defaults come from the functions that typer makes verbs of: their signatures
and annotations, and not typer's parser, whose insides change from release to release.
"""

import inspect
import re
import types
import typing
from typing import Any

MARK = "<!-- commands -->"
_BOLD = re.compile(r"\[bold\](.*?)\[/bold\]")
_TYPES = {int: "NUMBER", str: "TEXT"}
_ROWS = "| | takes | |\n| --- | --- | --- |"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill the page that asks for it."""
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands() -> str:
    """Every verb: what it does, its arguments and options, its examples."""
    from mxtorq.cli import app  # the package, whose files register every verb

    return "\n\n".join(_verb(command) for command in app.registered_commands)


def _verb(command: Any) -> str:
    function = command.callback
    annotations = typing.get_type_hints(function, include_extras=True)
    rows = [
        _row(name, parameter.default, *typing.get_args(annotations[name])[:2])
        for name, parameter in inspect.signature(function).parameters.items()
    ]
    heading = f"## mxtorq {command.name or function.__name__}"
    _, *examples = [line.strip() for line in command.epilog.split("\n\n")]
    shown = ["```shell", *examples, "```"]
    return "\n".join([heading, "", inspect.getdoc(function) or "", "", _ROWS, *rows, "", *shown])


def options(about: Any) -> list[str]:
    """The names of an option; none of an argument.

    In an annotation the first name stands where a default would, and typer tells them apart later.
    """
    told = (about.default, *(about.param_decls or ()))
    return [text for text in told if isinstance(text, str) and text.startswith("-")]


def _row(name: str, default: Any, kind: Any, about: Any) -> str:
    """An argument or option as a row of the table."""
    names = options(about)
    shown = ", ".join(names) or about.metavar or name.upper()
    takes = about.metavar or _TYPES.get(_inner(kind), "PATH")
    if not names or _inner(kind) is bool:
        takes = ""
    help_text = _BOLD.sub(r"`\1`", about.help or "").replace("\\[", "[").strip()
    if default is inspect.Parameter.empty:
        help_text += " **Required.**"
    elif default not in (None, False) and "[default:" not in help_text:
        help_text += f" [default: {default}]"
    # Between backticks a bar separates no cells.
    cells = (
        f"`{shown}`",
        " ".join(f"`{choice}`" for choice in takes.split("|") if takes),
        help_text.replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |"


def _inner(kind: Any) -> Any:
    """``int`` of ``int | None``, ``Path`` of ``list[Path] | None``."""
    if isinstance(kind, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return typing.get_args(kind)[0] if typing.get_args(kind) else kind
