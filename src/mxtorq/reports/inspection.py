"""The record of an inspection: what MXFP4 sees of a model, before and after each transform.

Version 1. A reader refuses other versions, and a record whose counts do not add up. Counts and
mean squares are kept, not the figures made of them: entropies, shares and spreads are properties
here, so that each has one definition and a picture can be drawn of what they sum up.

A *codeword* is a value of E2M1: 15 of them, because the codes of 0 and of -0 stand for one. The
entropy of 15 equally used ones is log2 15 = 3.91 bits. A code is *cut* where the value over its
block's scale lies beyond 6. *Zero* counts what was zero before and what became zero.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from mxtorq.errors import UsageError
from mxtorq.reading.documents import Refusal, fields_of, parse_object, require_keys
from mxtorq.reports.schema import OTHER_VERSION, sqnr_db

SCHEMA = "mxtorq.inspection"
VERSION = 1
LONGEST = 256 * 2**20
"""Bytes: a model of a hundred layers under five methods."""

CODES = 16
CODEWORDS = 15
_BLOCK = 32

_refuse = Refusal(
    kind=UsageError,
    asked="a record of an inspection",
    why=f"this release reads {SCHEMA} version {VERSION}",
    todo="pass a file written by `mxtorq inspect MODEL --json`",
)


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A channel and its share of the energy (the sum of squares) of all."""

    index: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token whose vector is long, and how many times the median one."""

    window: int
    position: int
    text: str
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Rows of one width as MXFP4 sees them: a site's inputs, or the weights that read it."""

    rows: int
    block_variances: list[float]
    """Mean square of each block of 32 features, about zero."""
    position_variances: list[float]
    """Mean square of each of the 32 positions inside of a block, over all blocks."""
    code_counts: list[int]
    """How often each of the 16 codes is used; code 8 + c is minus code c."""
    cut: int
    """Elements beyond 6 times their scale, which become 6."""
    scale_exponents: dict[str, int]
    """How many blocks have which scale, by its exponent as text; -127 is a block of zeros too."""
    relative_error: float
    """sum (x - x_q)^2 / sum x^2."""
    worst_channels: list[Channel]
    """Those with the most energy, largest first."""

    @property
    def elements(self) -> int:
        return sum(self.code_counts)

    @property
    def max_over_mean(self) -> float:
        """The largest block variance over their mean: 1 where all are equal."""
        mean = sum(self.block_variances) / len(self.block_variances)
        return max(self.block_variances) / mean if mean else 1.0

    @property
    def max_over_median(self) -> float:
        """The largest block variance over their median; infinite where most are 0."""
        middle, most = median(self.block_variances), max(self.block_variances)
        return most / middle if middle else (math.inf if most else 1.0)

    @property
    def codeword_counts(self) -> list[int]:
        """How often each of the 15 values is used, from -6 to 6."""
        counts = self.code_counts
        return [*counts[:8:-1], counts[0] + counts[8], *counts[1:8]]

    @property
    def magnitude_counts(self) -> list[int]:
        """How often each of the eight magnitudes is used, from 0 to 6."""
        return [self.code_counts[code] + self.code_counts[8 + code] for code in range(8)]

    @property
    def entropy(self) -> float:
        """Of the codewords, in bits: 0 to log2 15."""
        shares = [count / self.elements for count in self.codeword_counts if count]
        return abs(sum(share * math.log2(share) for share in shares))  # abs: 1 word gives -0.0

    @property
    def zero_share(self) -> float:
        return self.magnitude_counts[0] / self.elements

    @property
    def cut_share(self) -> float:
        return self.cut / self.elements

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, in decibels."""
        return sqnr_db(self.relative_error)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A site under one method."""

    inputs: Picture
    weights: Picture
    """Of all linears that read the site, one below the other."""
    output_error: float | None = None
    """sum ||y - y_q||^2 / sum ||y||^2 of those linears in W4A4, rounded to nearest, on a sample of
    the inputs: what both errors come to. None where experts share the tokens out."""


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """One site."""

    site: str
    kind: str
    """Which of a layer's inputs: ``qkv_in``, ``o_in``, ``gate_up_in``, ``down_in``."""
    width: int
    linears: list[str]
    massive_tokens: list[Token]
    """The longest inputs, before any transform; none where experts share the tokens out."""
    methods: dict[str, Pair]
    """By method; ``identity``, the site as it is, comes first."""


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What quantizing one site alone, weights and inputs, does to the model."""

    site: str
    method: str
    kl: float
    """Mean KL(BF16 || model) of a prediction, in nats."""
    agreement: float
    """Share of predictions whose likeliest token stays."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All of it."""

    model: str
    family: str
    methods: list[str]
    scale_rule: str
    seed: int
    outliers: str | None
    calibration: dict[str, Any]
    """The text that inputs were measured on, as in a record of results."""
    sites: list[SiteRecord]
    residual_tokens: dict[str, list[Token]]
    """The longest vectors of the residual stream behind each layer, unquantized."""
    harm: list[Harm] = field(default_factory=list)
    """Most harmful first; empty where nobody asked."""
    evaluation: dict[str, Any] | None = None
    """The text that harm was measured on."""
    unfit: dict[str, int] = field(default_factory=dict)
    """Sites of a width that 32 does not divide, which were left out."""
    versions: dict[str, str]
    command: str = ""

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "a record of an inspection") -> "Inspection":
        """Raises:
        UsageError: not a record of this schema and version, or one that contradicts itself.
        """
        content = parse_object(text, _refuse)
        schema, version = content.pop("schema", None), content.pop("version", None)
        if (schema, version) != (SCHEMA, VERSION):
            refuse = replace(_refuse, asked=where, todo=OTHER_VERSION)
            raise refuse(f"schema {schema!r:.100}, version {version!r:.100}")
        _each(content, "sites", _site)
        _each(content, "residual_tokens", lambda tokens: _list(tokens, Token))
        _each(content, "harm", lambda each: Harm(**fields_of(each, Harm, _refuse, "a harm")))
        read = cls(**fields_of(content, cls, _refuse, "an inspection"))
        _require_whole(read)
        return read


def _require_whole(read: Inspection) -> None:
    """Every site has every method, and harm is told of all of them or of none."""
    methods = {*read.methods}
    if not read.sites or read.methods[:1] != ["identity"] or len(methods) != len(read.methods):
        raise _refuse(f"{len(read.sites)} sites under the methods {read.methods}")
    for site in read.sites:
        if site.methods.keys() != methods:
            raise _refuse(f"{site.site} under {', '.join(site.methods)}, not {read.methods}")
    told = [(each.site, each.method) for each in read.harm]
    if told and {*told} != {(site.site, method) for site in read.sites for method in methods}:
        raise _refuse(f"harm of {len(told)} sites and methods, not of all")
    for text in (read.calibration, read.evaluation):
        if text is not None:
            require_keys(text, {"source": str, "tokens": int}, _refuse, "a text")


def _site(content: Any) -> SiteRecord:
    values = _object(content, "a site")
    _each(values, "methods", _pair)
    values["massive_tokens"] = _list(values.get("massive_tokens"), Token)
    site = SiteRecord(**fields_of(values, SiteRecord, _refuse, "a site"))
    for pair in site.methods.values():
        for picture in (pair.inputs, pair.weights):
            _require_sense(site, picture)
        if pair.output_error is not None and not 0 <= pair.output_error < math.inf:
            raise _refuse(f"{site.site}: an output error of {pair.output_error}")
    return site


def _pair(content: Any) -> Pair:
    values = _object(content, "a method")
    for name in ("inputs", "weights"):
        picture = _object(values.get(name), name)
        picture["worst_channels"] = _list(picture.get("worst_channels"), Channel)
        values[name] = Picture(**fields_of(picture, Picture, _refuse, name))
    return Pair(**fields_of(values, Pair, _refuse, "a method"))


def _require_sense(site: SiteRecord, picture: Picture) -> None:
    """Counts and lengths belong to one tensor of the site's width."""
    blocks = site.width // _BLOCK
    lengths = [len(picture.block_variances), len(picture.position_variances)]
    lengths.append(len(picture.code_counts))
    if lengths != [blocks, _BLOCK, CODES] or not blocks or picture.rows < 1:
        raise _refuse(f"{site.site} of width {site.width} with {lengths} blocks, positions, codes")
    counts = [*picture.code_counts, *picture.scale_exponents.values(), picture.cut]
    scales = sum(picture.scale_exponents.values())
    if min(counts) < 0 or (picture.elements, scales) != (
        picture.rows * site.width,
        picture.rows * blocks,
    ):
        raise _refuse(
            f"{site.site}: {picture.elements} codes and {scales} scales of {picture.rows} rows"
        )
    reals = [*picture.block_variances, *picture.position_variances, picture.relative_error]
    if not all(0 <= real < math.inf for real in reals):
        raise _refuse(f"{site.site}: a mean square or an error of {min(reals)} to {max(reals)}")
    if not picture.worst_channels:
        raise _refuse(f"{site.site} without its loudest channel")
    for text in picture.scale_exponents:
        if not re.fullmatch(r"-?[0-9]{1,3}", text) or not -127 <= int(text) <= 127:
            raise _refuse(f"{site.site}: a scale of 2^{text!r:.20}")


def _object(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _refuse(f"{where} of type {type(content).__name__}, not an object")
    return dict(content)


def _list(content: Any, kind: type[Any]) -> list[Any]:
    if not isinstance(content, list):
        raise _refuse(f"{kind.__name__} of type {type(content).__name__}, not a list")
    return [kind(**fields_of(each, kind, _refuse, kind.__name__)) for each in content]


def _each(values: dict[str, Any], name: str, make: Callable[[Any], Any]) -> None:
    """Replace the entries of a list or a table by what is made of each; others stay to be told."""
    found = values.get(name)
    if isinstance(found, list):
        values[name] = [make(each) for each in found]
    elif isinstance(found, dict):
        values[name] = {key: make(each) for key, each in found.items()}
