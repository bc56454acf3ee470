"""A source model's licence and origin, and the card that passes them on.

Read from the front matter of its README.md, and from files such as LICENSE and NOTICE, which are
copied. All of it is optional: what is absent, too large or not understood is left out and the card
says so, since a run of hours must not end for a README. On the hub only the usual names are asked
for, and an answer that does not come counts as none.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mxtorq.errors import ModelError, MxtorqError
from mxtorq.export.card import CARD, Papers, card
from mxtorq.export.manifest import Manifest
from mxtorq.loading.source import REFERENCE
from mxtorq.reading.documents import Refusal, read_bytes, read_text
from mxtorq.reading.front_matter import front_matter
from mxtorq.writing import fingerprint, write_text, written

LONGEST = 2**20
"""Bytes of a README or a licence that is looked at."""

_MOST_FILES = 8
_LICENCE = re.compile(r"(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)([._-][\w.-]{1,40})?", re.I | re.A)
_ON_HUB = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.A)
_REFUSE = Refusal(kind=ModelError, asked="the papers of a model", why="unreadable", todo="")


def read_papers(name: str) -> Papers:
    """What a model, by folder, hub id or ``reference``, says of its licence and origin."""
    if name == REFERENCE:
        return Papers(license="apache-2.0")  # as the package that it is in
    folder = Path(name)
    local = folder.is_dir()
    find: Callable[[str], Path | None] = _Folder(folder) if local else _Hub(name)
    present = sorted(path.name for path in folder.iterdir()) if local else _ON_HUB
    files: dict[str, bytes] = {}
    for each in filter(_LICENCE.fullmatch, present):
        content = _bytes(find(each))
        if content is not None and len(files) < _MOST_FILES:
            files[each] = content
    said = _said(find(CARD))
    bases = [base for base in said.get("base_model", []) if _HUB_ID.fullmatch(base)]
    link = _one(said, "license_link")
    if link is not None and not link.startswith("https://") and link not in files:
        link = None if local else f"https://huggingface.co/{name}/blob/main/{link}"
    return Papers(
        hub_name=None if local else name,
        base_models=tuple(bases),
        license=_one(said, "license"),
        license_name=_one(said, "license_name"),
        license_link=link,
        files=files,
    )


def with_card(folder: Path, manifest: Manifest) -> Manifest:
    """Put a card and the source's licence files into a checkpoint that has all but its manifest.

    Returns:
        The manifest that names them.

    Raises:
        OSError: the disk is full or refuses.
    """
    papers = read_papers(str(manifest.source["model"]))
    papers = replace(
        papers, files={n: c for n, c in papers.files.items() if n not in manifest.files}
    )
    for name, content in papers.files.items():
        with written(folder / name) as file:
            file.write(content)
    write_text(folder / CARD, card(manifest, papers))
    added = {name: fingerprint(folder / name) for name in (CARD, *papers.files)}
    return replace(manifest, files=dict(sorted({**manifest.files, **added}.items())))


class _Folder:
    """Finds files of a folder that are in it, or, by links, in the hub's cache around it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, file: str) -> Path | None:
        folder, found = self._folder.resolve(), (self._folder / file).resolve()
        cache = folder.parent.parent / "blobs"  # beside snapshots/REVISION
        return found if found.parent in (folder, cache) else None


class _Hub:
    """Finds files of a repository, those that are there."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, file: str) -> Path | None:
        from transformers.utils.hub import cached_file

        try:
            found = cached_file(self._name, file, _raise_exceptions_for_missing_entries=False)
        except Exception:  # no network, no such file in the cache: transformers has many roots
            return None
        return None if found is None else Path(found)


def _bytes(path: Path | None) -> bytes | None:
    with suppress(MxtorqError):
        return None if path is None else read_bytes(path, LONGEST, _REFUSE)
    return None


def _said(path: Path | None) -> dict[str, list[str]]:
    with suppress(MxtorqError):
        return {} if path is None else front_matter(read_text(path, LONGEST, _REFUSE))
    return {}


def _one(said: dict[str, list[str]], key: str) -> str | None:
    values = said.get(key, [])
    return values[0] if len(values) == 1 else None
