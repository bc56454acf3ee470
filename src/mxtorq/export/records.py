"""What an unfinished run remembers, and how it is known again: seals, hashes, requests.

A record is a JSON file with a seal: SHA-256 over the seal of the record before, or of what was
asked for, and over its own content. So a record that was changed, left out, or brought from another
run is none; and since it holds the hashes of its files, nothing of a layer can differ from what was
written without being noticed. It is a guard against disks and mistakes, not against an adversary,
who could make seals of his own.
"""

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxtorq.errors import OutputError
from mxtorq.export.manifest import SiteEntry
from mxtorq.reading.documents import Refusal, parse_object, read_text
from mxtorq.writing import fingerprint, write_text

LONGEST = 32 * 2**20
"""Bytes of a record."""
REQUEST = "run.json"
"""The file that says what was asked for, and so whose folder it is."""


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """A finished layer."""

    sites: list[SiteEntry]
    kept: list[str]
    """Its linears that stay in BF16, by full name."""
    files: dict[str, dict[str, Any]]
    """``sha256`` and ``bytes`` by path below the folder; the activations behind it included."""


def seal_of(before: str, content: Mapping[str, Any]) -> str:
    """The seal of a content that follows on another seal."""
    return hashlib.sha256(f"{before}\n{json.dumps(content)}".encode()).hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any], before: str) -> str:
    """Write a record; returns its seal. Raises `OSError`."""
    seal = seal_of(before, content)
    write_text(path, json.dumps({"seal": seal, **content}, indent=1) + "\n")
    return seal


def read_sealed(path: Path, before: str, refuse: Refusal) -> tuple[dict[str, Any], str]:
    """The content of a record, and its seal.

    Raises:
        MxtorqError: it is not as it was written, or follows on another seal.
    """
    content = parse_object(read_text(path, LONGEST, refuse), refuse)
    found = content.pop("seal", None)
    try:
        seal = seal_of(before, content)
    except RecursionError as error:
        raise refuse(f"{path.name}: {error}") from error
    if found != seal:
        raise refuse(f"{path.name}, whose seal {found!r:.100} is not {seal}")
    return content, seal


def require_whole(folder: Path, name: str, expected: Mapping[str, Any], refuse: Refusal) -> None:
    """Refuse a file of a folder that is not as it was written.

    Raises:
        MxtorqError: so it is.
        OSError: the disk fails.
    """
    path = folder / name
    try:
        regular = stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        raise refuse(f"no {name}") from None
    if not regular:  # a link may lead to the right bytes today
        raise refuse(f"{name}, which is no regular file")
    found = fingerprint(path)
    if found != expected:
        raise refuse(f"{name}: {found}, its record says {expected}")


def require_same(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was asked for something else.

    Raises:
        OutputError: so it was; with the fields that differ.
    """
    try:
        before, after = _flat(earlier), _flat(now)
    except RecursionError:  # no request of ours is that deep
        before, after = {REQUEST: "..."}, {}
    differing = [
        f"{name} = {before.get(name)!r:.100} (now {after.get(name)!r:.100})"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    if differing:
        raise OutputError(
            asked=f"to go on with the unfinished run {folder}",
            found=f"a run with {'; '.join(differing[:5])}",
            why="the layers that it finished belong to another checkpoint",
            todo="give it the arguments of that run, name another output, or remove that folder to "
            "start again",
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
