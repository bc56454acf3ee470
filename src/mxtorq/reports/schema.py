"""The record of results: a JSON object that other tools can rely on. Documented in docs/results.md.

Version 1. A reader refuses other versions. New optional fields do not change the version; a field
that changes its meaning, or goes, does.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mxtorq.errors import UsageError
from mxtorq.reading.documents import (
    Refusal,
    conforms,
    fields_of,
    parse_object,
    require_keys,
)

SCHEMA = "mxtorq.results"
VERSION = 1
LONGEST = 64 * 2**20
"""Bytes: of some thousand rows of a thousand windows each."""

_PROVENANCE: dict[str, dict[str, Any]] = {
    "evaluation": {"source": str, "tokens": int, "seqlen": int},
    "calibration": {"source": str, "tokens": int, "text_sha256": str},
    "unfit": {},
    "tasks": {"documents": str, "limit": int | None, "engine": str},
}
"""What pages take out of a row's provenance, where it is there."""

_TASK: dict[str, Any] = {
    **dict.fromkeys(("metric", "version", "prompts_sha256"), str),
    **dict.fromkeys(("documents", "shots", "truncated"), int),
    "value": float,
    "stderr": float | None,
    "metrics": dict[str, float],
}
"""A task's result: see docs/results.md."""

_refuse = Refusal(
    kind=UsageError,
    asked="a record of results",
    why=f"this release reads {SCHEMA} version {VERSION}",
    todo="pass a file written by --json",
)
OTHER_VERSION = (
    "read it with the release of mxtorq that wrote it, or run the command again with another "
    "--json; `versions` and `command` in the file say which"
)


def sqnr_db(error: float) -> float:
    """Signal to quantization noise of a relative squared error, in decibels."""
    return math.inf if error == 0 else -10 * math.log10(error)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluated model."""

    method: str
    """``bf16`` for the unquantized baseline, else the method as on the command line."""
    rounding: str | None
    """How weights were rounded; None for the baseline."""
    scale_rule: str | None
    """The scale rule of weights, and of activations unless ``activation_rule`` says otherwise; None
    for the baseline."""
    perplexity: float
    nll: float
    predictions: int
    seed: int | None
    """Of calibration and fitting; None for the baseline."""
    outliers: str | None
    """The profile that the model's channels were rescaled by, if any."""
    ocp: bool = True
    """False: scales that no hardware has. Such rows explain published numbers and stand apart."""
    activation_rule: str | None = None
    """The scale rule of activations where it is not that of the weights."""
    target: str | None = None
    """The engine that it was quantized for; None for the baseline and in older records."""
    kl: float | None = None
    """Mean over predictions of KL(baseline || this model), in nats."""
    kl_p99: float | None = None
    """The 99th percentile of that divergence over the predictions: a value that occurs."""
    agreement: float | None = None
    """Share of predictions whose likeliest token is the baseline's."""
    windows: dict[str, list[float]] = field(default_factory=dict)
    """By window of the text, in its order, the sums over its predictions of ``nll``, ``kl`` and
    ``agreement``: what `intervals` compares rows by. The last two only beside a baseline."""
    layer_errors: dict[str, float] = field(default_factory=dict)
    """Relative squared error of the residual stream behind each decoder layer, on the evaluation
    text. Empty where the stream was rotated and has other coordinates than the baseline's."""
    site_error: float | None = None
    """Mean over sites of the relative squared output error on calibration tokens."""
    site_errors: dict[str, float] = field(default_factory=dict)
    """That error of each site."""
    choices: dict[str, str] = field(default_factory=dict)
    """Of a method that chooses, the candidate that it took at each site; empty elsewhere."""
    multiply_adds_per_token: int | None = None
    """Online cost of the transforms, summed over sites."""
    extra_bytes: int | None = None
    """What the stored transforms occupy beside the model."""
    search_seconds: float | None = None
    """Time in which the method chose its transforms."""
    quantize_seconds: float | None = None
    """Time of the whole quantization, calibration and search included."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the model answered, by task."""
    averages: dict[str, float] = field(default_factory=dict)
    """Means over tasks, by the names that papers give them."""
    options: dict[str, Any] = field(default_factory=dict)
    """All options of the method, defaults too."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """``model``, ``weights_sha256``, ``baseline_dtype``, ``compute_dtype``, ``recipe``,
    ``calibration``, ``evaluation``, ``unfit``."""

    @property
    def rules(self) -> str | None:
        """The scale rule, of weights/activations where there are two."""
        return self.scale_rule and "/".join(filter(None, (self.scale_rule, self.activation_rule)))


@dataclass(frozen=True, kw_only=True)
class Results:
    """Rows of one run and what made them."""

    rows: tuple[Row, ...]
    versions: dict[str, str]
    command: str = ""
    """The command lines behind the rows, one a line; empty when they came from Python."""

    @property
    def only_evaluated(self) -> bool:
        """Nothing was quantized for it, so that no row has a time: a record of `evaluate`."""
        return all(row.quantize_seconds is None for row in self.rows)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "a record of results") -> "Results":
        """Raises:
        UsageError: not a record of this schema and version.
        """
        content = parse_object(text, _refuse)
        schema, version = content.get("schema"), content.get("version")
        if (schema, version) != (SCHEMA, VERSION):
            refuse = replace(_refuse, asked=where, todo=OTHER_VERSION)
            raise refuse(f"schema {schema!r:.100}, version {version!r:.100}")
        expected = {"rows": list[dict[str, Any]], "versions": dict[str, str], "command": str}
        require_keys(content, expected, _refuse, "a record")
        known = {f.name for f in fields(Row)}
        rows = []
        for values in content["rows"]:
            row = {name: value for name, value in values.items() if name in known}
            rows.append(Row(**fields_of(row, Row, _refuse, "a row")))
            _require_sense(rows[-1])
        return cls(command=content["command"], rows=tuple(rows), versions=content["versions"])


def groups(results: Results) -> list[list[Row]]:
    """Rows that differ in their seed only: a line of the table each."""
    found: dict[object, list[Row]] = {}
    for row in results.rows:
        key = (row.outliers, row.method, row.rounding, row.rules)
        found.setdefault(key, []).append(row)
    return list(found.values())


def _require_sense(row: Row) -> None:
    errors = [*row.site_errors.values(), *row.layer_errors.values(), row.site_error or 0.0]
    if row.perplexity < 1 or any(error < 0 for error in errors):
        raise _refuse(f"perplexity {row.perplexity}, site errors from {min(errors)}")
    for name, result in row.tasks.items():
        require_keys(result, _TASK, _refuse, f"the task {name!r:.100}")
    if row.agreement is not None and not 0 <= row.agreement <= 1:
        raise _refuse(f"an agreement of {row.agreement}, which is a share")
    _require_windows(row)
    for part, hints in _PROVENANCE.items():
        table = row.provenance.get(part)
        if table is not None and not conforms(table, dict[str, Any]):
            raise _refuse(f"{part} = {table!r:.200}")
        if table:
            require_keys(table, hints, _refuse, part)


def _require_windows(row: Row) -> None:
    """Sums by window are those of one text, and come to the figures of the row."""
    if not row.windows:
        return
    count = len(row.windows.get("nll", ()))
    lengths = {name: len(sums) for name, sums in row.windows.items()}
    if set(lengths) - {"nll", "kl", "agreement"} or set(lengths.values()) != {count} or not count:
        raise _refuse(f"windows of {lengths}")
    if row.predictions < 1 or row.predictions % count:
        raise _refuse(f"{row.predictions} predictions in {count} windows")
    for name, sums in row.windows.items():
        mean, whole = sum(sums) / row.predictions, getattr(row, name)
        if whole is None or not math.isclose(mean, whole, rel_tol=1e-9, abs_tol=1e-12):
            raise _refuse(f"{name} {whole}, and windows with a mean of {mean}")
