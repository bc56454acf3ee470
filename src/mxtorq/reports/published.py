"""Published figures as data: a strict reader of files such as docs/published.toml.

A published perplexity means something only with its model, scale rule, text and calibration, so
those are data too and not prose: a figure whose rule is not known says "unknown" and is never taken
for one under the rule of somebody's run. What a source shares among its figures stands once, under
``[protocols]``. What is not known is absent; nothing is filled in.

Unknown keys are refused with the nearest known one, as in recipes. Rules are compared by name: the
reader knows no number format and loads no torch. What a run is compared with is decided in
`against`.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from mxtorq.errors import UsageError
from mxtorq.evaluation.tasks import SUITES
from mxtorq.reading.documents import Refusal, fields_of, read_text
from mxtorq.specs import unknown

LONGEST = 2**19
"""Bytes of such a file: some thousand figures."""

UNKNOWN = "unknown"

RULES = ("floor", "even", "rceil", "ceil", "floor6", "uos", "log256", "four-thirds", UNKNOWN)
"""Scale rules by our names, and what stands for one that its source does not give."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that figures are of."""

    names: list[str]
    """Last parts of hub names and folders that are this model; none where nobody knows which it
    was."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a source says of all its figures."""

    source: str
    text: str | None = None
    """Of perplexities, by our names."""
    seqlen: int | None = None
    calibration: str | None = None
    calibration_tokens: int | None = None
    average: str | None = None
    """Of accuracies: a name of `evaluation.tasks.SUITES`; None where the tasks are not known."""
    differs: list[str] = field(default_factory=list)
    """From mxtorq, in every run."""
    accuracy_differs: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a source gives for an unquantized model."""

    model: str
    protocol: str
    perplexity: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A published figure of a quantized model."""

    model: str
    protocol: str
    called: str
    """The method as its source calls it."""
    scale_rule: str
    method: str | None = None
    """As on our command line, with the options that are known; None: mxtorq has no such method."""
    rounding: str = UNKNOWN
    perplexity: float | None = None
    accuracy: float | None = None
    """In percent, the average that the protocol names."""
    tolerance: float | None = None
    """How far a perplexity may be off, where that was made a requirement."""
    note: str | None = None

    @property
    def name(self) -> str | None:
        """The method without its options."""
        return self.method and self.method.partition(":")[0]

    @property
    def options(self) -> dict[str, str]:
        """The options of the method that are known."""
        items = (item.partition("=") for item in (self.method or "").split(":")[1:])
        return {key: value for key, _, value in items}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A file of published figures."""

    where: str
    """Its name."""
    models: dict[str, Model]
    protocols: dict[str, Protocol]
    baselines: tuple[Baseline, ...]
    rows: tuple[PublishedRow, ...]

    def model_called(self, name: str) -> str | None:
        """The model that a hub id or a folder is, if figures of it are there."""
        parts = PurePosixPath(name.replace("\\", "/")).parts
        # The hub's cache: .../models--OWNER--NAME/snapshots/COMMIT
        cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
        last = cached[-1] if cached else parts[-1] if parts else ""
        for model, known in self.models.items():
            if last.casefold() in {each.casefold() for each in known.names}:
                return model
        return None

    def baseline(self, row: PublishedRow) -> Baseline | None:
        """What the source of a row gives for the same model unquantized."""
        same = (b for b in self.baselines if (b.model, b.protocol) == (row.model, row.protocol))
        return next(same, None)


def read_published(path: Path) -> Published:
    """The published figures of a TOML file.

    Raises:
        UsageError: there is no such file, it is no TOML, or it breaks a rule of such files.
    """
    refuse = Refusal(
        kind=UsageError,
        asked=f"the published figures in {path}",
        why="they cannot be read",
        todo="name or correct such a file; docs/published.toml says at its top what is in one",
    )
    text = read_text(path, LONGEST, refuse)
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(f"{type(error).__name__}: {error}", "the file is no TOML") from error
    known = {"models", "protocols", "baseline", "row"}
    for key in content:
        if key not in known:
            raise unknown(f"part of {path}", key, known)
    protocols = _table(content, "protocols", Protocol, refuse)
    published = Published(
        where=path.name,
        models=_table(content, "models", Model, refuse),
        protocols=protocols,
        baselines=tuple(_list(content, "baseline", Baseline, refuse)),
        rows=tuple(_list(content, "row", PublishedRow, refuse)),
    )
    _require_sense(published, refuse)
    return published


def _table(content: Mapping[str, Any], part: str, kind: type[Any], refuse: Refusal) -> Any:
    tables = content.get(part, {})
    if not isinstance(tables, dict):
        raise refuse(f"{part} = {tables!r:.100}", f"[{part}.NAME] is a table")
    return {
        name: _built(values, kind, refuse, f"[{part}.{name}]") for name, values in tables.items()
    }


def _list(content: Mapping[str, Any], part: str, kind: type[Any], refuse: Refusal) -> Any:
    tables = content.get(part, [])
    if not isinstance(tables, list):
        raise refuse(f"{part} = {tables!r:.100}", f"[[{part}]] has two brackets on each side")
    return [
        _built(values, kind, refuse, f"[[{part}]] {number}")
        for number, values in enumerate(tables, 1)
    ]


def _built(values: Any, kind: type[Any], refuse: Refusal, where: str) -> Any:
    names = {each.name for each in fields(kind)}
    for key in values if isinstance(values, dict) else ():
        if key not in names:
            raise unknown(f"key of {where}", key, names)
    return kind(**fields_of(values, kind, refuse, where))


def _require_sense(published: Published, refuse: Refusal) -> None:
    names = [name.casefold() for model in published.models.values() for name in model.names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise refuse(f"the name {twice[0]!r} twice under [models]", "a name is one model's")
    for where, protocol in published.protocols.items():
        if protocol.average is not None and protocol.average not in SUITES:
            raise unknown(f"average of [protocols.{where}]", protocol.average, SUITES)
    seen = set()
    for baseline in published.baselines:
        _require_known(published, baseline)
        _require_figures(baseline, f"the baseline of {baseline.model}", refuse)
        if (baseline.model, baseline.protocol) in seen:
            raise refuse(f"two baselines of {baseline.model} by {baseline.protocol}")
        seen.add((baseline.model, baseline.protocol))
    for row in published.rows:
        _require_known(published, row)
        _require_figures(row, f"{row.called} of {row.model}", refuse)
        if row.scale_rule not in RULES:
            raise unknown(f"scale_rule of {row.called} of {row.model}", row.scale_rule, RULES)
        if row.tolerance is not None and not 0 < row.tolerance < math.inf:
            raise refuse(f"{row.called} of {row.model} with a tolerance of {row.tolerance}")


def _require_known(published: Published, row: Baseline | PublishedRow) -> None:
    if row.model not in published.models:
        raise unknown(f"model of {published.where}", row.model, published.models)
    if row.protocol not in published.protocols:
        raise unknown(f"protocol of {published.where}", row.protocol, published.protocols)


def _require_figures(row: Baseline | PublishedRow, where: str, refuse: Refusal) -> None:
    if row.perplexity is None and row.accuracy is None:
        raise refuse(f"{where} without perplexity and accuracy", "there is nothing to compare with")
    if row.perplexity is not None and not 1 <= row.perplexity < math.inf:
        raise refuse(f"{where} with a perplexity of {row.perplexity}", "none is below 1")
    if row.accuracy is not None and not 0 <= row.accuracy <= 100:
        raise refuse(f"{where} with an accuracy of {row.accuracy}", "accuracies are in percent")
