"""The application that verbs register with, and what they share."""

from typing import Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="MXFP4 W4A4 quantization of large language models, exact to the bit: TORQ and its rivals.",
    epilog="Start with [bold]mxtorq demo[/bold]. MODEL is a folder, a hub id, or "
    "[bold]reference[/bold], the small model inside this package.",
)


def given(**options: Any) -> dict[str, Any]:
    """The options that somebody named."""
    return {name: value for name, value in options.items() if value is not None}
