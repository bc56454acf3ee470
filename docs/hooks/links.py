"""Links that leave the documentation: ``../src/mxtorq/cli`` works where a repository is browsed.

On the site there is no such page. Where the project has an address (``repo_url``) the link leads
there, elsewhere its text becomes the path, in code. What it leads to must exist either way.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page that lead out of ``docs``."""
    root = Path(config.docs_dir).resolve()
    here = (root / page.file.src_uri).parent

    def rewritten(found: re.Match[str]) -> str:
        target = (here / found[2]).resolve()
        if target.is_relative_to(root):
            return found[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {found[0]} leads nowhere")
        path = target.relative_to(root.parent).as_posix()
        if config.repo_url:
            return f"[{found[1]}]({config.repo_url.rstrip('/')}/blob/main/{path}{found[3] or ''})"
        return f"`{path}`" if found[1].strip("`") in (path, found[2]) else f"{found[1]} (`{path}`)"

    return _LINK.sub(rewritten, markdown)
