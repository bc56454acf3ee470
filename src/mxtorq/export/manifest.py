"""The manifest: what a checkpoint is, how it was made, and what each site lost.

A JSON file beside the tensors. It holds no time of day and no path, so that the same run gives the
same bytes. Readers refuse versions and fields that they do not know instead of guessing.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from mxtorq.errors import CheckpointError
from mxtorq.reading.documents import Refusal, fields_of, parse_object, require_keys

FILE = "mxtorq.json"
SCHEMA = "mxtorq.manifest"
VERSION = 2
LONGEST = 32 * 2**20
"""Bytes: of a hundred thousand sites."""

_PARTS: dict[str, dict[str, Any]] = {
    "recipe": {"method": dict[str, Any], "rounding": dict[str, Any]},
    "scale_rules": {"weights": str, "activations": str},
    "source": {"model": str, "family": str, "outliers": str | None},
    "calibration": {"source": str, "tokens": int, "seqlen": int, "seed": int | None},
}
"""What readers take out of the tables of a manifest."""
_FILE = {"sha256": str, "bytes": int}
_COUNTS = {"count": int, "pooled": int, "unseen": int}
_CHOICE = {"candidate": str, "losses": dict[str, float], "at_least": dict[str, float]}


@dataclass(frozen=True, kw_only=True)
class SiteEntry:
    """One transformed and quantized input and the linears that read it."""

    site: str
    linears: list[str]
    width: int
    kind: str
    """The kind of its transform; its tensors are stored under the site's name."""
    multiply_adds: int
    """What the transform costs online for a token."""
    extra_bytes: int
    """What the stored transform occupies."""
    output_error: float
    """sum ||y - y_q||^2 / sum ||y||^2 over a sample of calibration tokens, W4A4 against the
    unquantized linears on the same inputs."""
    experts: dict[str, int] | None = None
    """Of a site that experts share: their ``count``; how many were ``pooled``, having seen fewer
    tokens than the site is wide, so that a rounding that looks at inputs looked at those of all
    experts; and how many of these were ``unseen``. Absent elsewhere."""
    choice: dict[str, Any] | None = None
    """Of a method that chooses: the ``candidate`` that was taken, the ``losses`` of those that were
    compared to the end, and what the others lose ``at_least``. Absent elsewhere."""


def site_entries(values: Any, refuse: Refusal) -> list[SiteEntry]:
    """Site entries from JSON values.

    Raises:
        MxtorqError: they are none.
    """
    if not isinstance(values, list):
        raise refuse(f"sites = {values!r:.200}")
    entries = [SiteEntry(**fields_of(each, SiteEntry, refuse, "a site entry")) for each in values]
    for entry in entries:
        if entry.output_error < 0:
            raise refuse(f"{entry.site} with a negative output_error")
        if entry.experts is not None:
            require_keys(entry.experts, _COUNTS, refuse, entry.site)
            if entry.experts["count"] < 1:
                raise refuse(f"{entry.site} with {entry.experts['count']} experts")
        if entry.choice is not None:
            require_keys(entry.choice, _CHOICE, refuse, entry.site)
            if entry.choice["candidate"] not in entry.choice["losses"]:
                raise refuse(f"{entry.site} with a candidate whose loss is not told")
    return entries


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but its tensors."""

    method: str
    """As on the command line, options included."""
    rounding: str
    """Likewise."""
    recipe: dict[str, Any]
    """Every choice of the run, all options of method and rounding with their values."""
    scale_rules: dict[str, str]
    """``weights`` and ``activations``."""
    seed: int
    source: dict[str, Any]
    """``model``, ``family``, ``baseline_dtype``, ``outliers``."""
    calibration: dict[str, Any]
    versions: dict[str, str]
    sites: list[SiteEntry]
    unfit: dict[str, int]
    """Sites left in BF16 because their width is no multiple of 32, and that width."""
    files: dict[str, dict[str, Any]]
    """``sha256`` and ``bytes`` of every other file of the folder."""

    @property
    def mean_output_error(self) -> float:
        """The mean of `SiteEntry.output_error` over sites."""
        return sum(entry.output_error for entry in self.sites) / max(1, len(self.sites))

    @property
    def multiply_adds_per_token(self) -> int:
        """Online cost of all transforms."""
        return sum(entry.multiply_adds for entry in self.sites)

    @property
    def extra_bytes(self) -> int:
        """What all stored transforms occupy."""
        return sum(entry.extra_bytes for entry in self.sites)

    def to_json(self) -> str:
        content = {"schema": SCHEMA, "version": VERSION, **asdict(self)}
        for entry in content["sites"]:
            for name in ("experts", "choice"):
                if entry[name] is None:
                    del entry[name]
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Raises:
        CheckpointError: not JSON, another schema or version, or other fields or types than this
            one's.
        """
        refuse = _refusal(where)
        content = parse_object(text, refuse)
        schema, version = content.pop("schema", None), content.pop("version", None)
        if (schema, version) != (SCHEMA, VERSION):
            why = f"this release reads {SCHEMA} version {VERSION} only"
            raise refuse(f"schema {schema!r}, version {version!r}", why)
        content["sites"] = site_entries(content.get("sites"), refuse)
        content = fields_of(content, cls, refuse, "a manifest")
        for part, keys in _PARTS.items():
            require_keys(content[part], keys, refuse, part)
        for name, facts in content["files"].items():
            require_keys(facts, _FILE, refuse, name)
        return cls(**content)


def _refusal(where: str) -> Refusal:
    return Refusal(
        kind=CheckpointError,
        asked=f"the manifest {where}",
        why="it is damaged",
        todo="load it with the release that wrote it (named under 'versions' in the file), or "
        "quantize again",
    )
