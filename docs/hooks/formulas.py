"""Formulas as MathML, made when the site is built: browsers draw it without a script or a font.

Pages write LaTeX between dollars, which repository viewers draw as well. `latex2mathml` turns it
into the markup; a formula that it cannot read ends the build.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Put MathML in the place of LaTeX."""

    def markup(found: re.Match[str], display: str) -> str:
        latex = html.unescape(found[1]).strip()
        try:
            drawn = convert(latex, display=display)
        except Exception as error:  # the library has no common root for what it cannot read
            raise PluginError(f"{page.file.src_uri}: {latex!r}: {error!r}") from error
        if "\\" in re.sub(r"<annotation.*", "", drawn):  # a command that it passes on as text
            raise PluginError(f"{page.file.src_uri}: {latex!r}: an unknown command")
        return drawn

    content = _INLINE.sub(lambda found: markup(found, "inline"), content)
    return _BLOCK.sub(lambda found: f'<div class="formula">{markup(found, "block")}</div>', content)
