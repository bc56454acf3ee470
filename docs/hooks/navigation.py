"""Folders in the navigation: ``methods/`` stands for its pages that are not named before it.

So a new page of a method appears on the site without an edit of mkdocs.yml, and none stands twice.
"""

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Write the pages of folders into ``nav``."""
    root, seen = Path(config.docs_dir), set[str]()
    config.nav = _filled(config.nav, root, seen)
    return config


def _filled(entries: list[Any], root: Path, seen: set[str]) -> list[Any]:
    filled: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            if isinstance(value, list):
                filled.append({title: _filled(value, root, seen)})
                continue
            seen.add(value)
            filled.append(entry)
        elif entry.endswith("/"):
            pages = sorted(
                path.relative_to(root).as_posix() for path in (root / entry).glob("*.md")
            )
            new = [page for page in pages if page not in seen]
            seen.update(new)
            filled += new
        else:
            seen.add(entry)
            filled.append(entry)
    return filled
