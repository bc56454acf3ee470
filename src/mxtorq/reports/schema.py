"""The record of results: a JSON object that other tools can rely on. Documented in docs/results.md.

Version 1. A reader refuses other versions. New optional fields do not change the version; a field
that changes its meaning, or goes, does.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mxtorq.errors import UsageError

SCHEMA = "mxtorq.results"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluated model."""

    method: str
    """``bf16`` for the unquantized baseline, else the method as on the command line."""
    rounding: str | None
    """How weights were rounded; None for the baseline."""
    scale_rule: str | None
    """The scale rule of weights and activations; None for the baseline."""
    perplexity: float
    nll: float
    predictions: int
    seed: int | None
    """Of calibration and fitting; None for the baseline."""
    outliers: str | None
    """The profile that the model's channels were rescaled by, if any."""
    ocp: bool = True
    """False: scales that no hardware has. Such rows explain published numbers and stand apart."""
    kl: float | None = None
    """Mean over predictions of KL(baseline || this model), in nats."""
    site_error: float | None = None
    """Mean over sites of the relative squared output error on calibration tokens."""
    site_errors: dict[str, float] = field(default_factory=dict)
    """That error of each site."""
    multiply_adds_per_token: int | None = None
    """Online cost of the transforms, summed over sites."""
    extra_bytes: int | None = None
    """What the stored transforms occupy beside the model."""
    search_seconds: float | None = None
    """Time in which the method chose its transforms."""
    quantize_seconds: float | None = None
    """Time of the whole quantization, calibration and search included."""
    options: dict[str, Any] = field(default_factory=dict)
    """All options of the method, defaults too."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """``model``, ``weights_sha256``, ``baseline_dtype``, ``compute_dtype``, ``recipe``,
    ``calibration``, ``evaluation``, ``unfit``."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Rows of one run and what made them."""

    rows: tuple[Row, ...]
    versions: dict[str, str]
    command: str = ""
    """The command lines behind the rows, one a line; empty when they came from Python."""

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """Raises:
        UsageError: not a record of this schema and version.
        """
        try:
            content = json.loads(text)
            schema, version = content["schema"], content["version"]
            if (schema, version) != (SCHEMA, VERSION):
                raise ValueError(f"schema {schema!r}, version {version!r}")
            known = {f.name for f in fields(Row)}
            rows = tuple(
                Row(**{k: v for k, v in row.items() if k in known}) for row in content["rows"]
            )
            return cls(command=content["command"], rows=rows, versions=content["versions"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                asked="a record of results",
                found=f"{type(error).__name__}: {error}",
                why=f"this release reads {SCHEMA} version {VERSION}",
                todo="pass a file written by --json",
            ) from error
