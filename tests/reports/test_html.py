"""The page as a file: well-formed, self-contained, the same twice, and safe against its record."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.reports.blocks import Grid, Page, Section
from mxtorq.reports.html import document, page
from mxtorq.reports.pages import markdown_of, page_of, read_record
from mxtorq.reports.schema import Results, Row

pytest.importorskip("matplotlib", reason="charts need the extra `report`")

RECORDS = Path(__file__).parents[2] / "docs" / "results"
VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}
EVIL = '</script><script>alert("x")</script><b>&amp;\x1b$\\alpha$'


class Reader(HTMLParser):
    """Elements with their attributes, the text in each, and whether all is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


def row(method: str = "torq", **changes: object) -> Row:
    values: dict[str, object] = {
        "method": method,
        "rounding": "gptq",
        "scale_rule": "floor",
        "perplexity": 3.0,
        "nll": 1.0,
        "predictions": 9,
        "seed": 0,
        "outliers": None,
        "site_error": 0.01,
        "site_errors": {"model.layers.0.qkv_in": 0.01, "model.layers.0.down_in": 0.02},
        "multiply_adds_per_token": 5,
        "search_seconds": 0.5,
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


BASE = Row(
    method="bf16",
    rounding=None,
    scale_rule=None,
    perplexity=2.0,
    nll=0.7,
    predictions=9,
    seed=None,
    outliers=None,
)


def manifest(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "method": "torq",
        "rounding": "rtn",
        "recipe": {"method": {"name": "torq"}, "rounding": {"name": "rtn"}, "seqlen": None},
        "scale_rules": {"weights": "floor", "activations": "even"},
        "seed": 3,
        "source": {"model": "m", "family": "llama", "baseline_dtype": "bf16", "outliers": None},
        "calibration": {"source": "stdlib", "tokens": 64, "seqlen": 32, "seed": 3},
        "versions": {"mxtorq": "0"},
        "sites": [
            SiteEntry(
                site=f"model.layers.{layer}.{kind}",
                linears=["a", "b"],
                width=64,
                kind="torq",
                multiply_adds=5,
                extra_bytes=7,
                output_error=0.01 * (layer + 1),
            )
            for layer in range(3)
            for kind in ("qkv_in", "down_in")
        ],
        "unfit": {"model.layers.0.o_in": 48},
        "files": {"model.safetensors": {"sha256": "ab" * 32, "bytes": 12345}},
    }
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["methods-reference", "methods-babyllama"])
def test_records_of_earlier_versions_have_pages(name: str) -> None:
    """Those that the project publishes, of which none was made for this page."""
    said = page_of(read_record((RECORDS / f"{name}.json").read_text(encoding="utf-8"), name))
    titles = [section.title for section in said.sections]
    assert titles[1:5] == [
        "Perplexity against BF16",
        "All figures",
        "Where it is lost",
        "What it costs",
    ]
    assert "not OCP" in str(said)


def test_an_earlier_record_becomes_a_whole_file() -> None:
    shown = page(read_record((RECORDS / "demo.json").read_text(encoding="utf-8"), "demo"))
    read = Reader(shown)
    assert read.open == []
    names = read.values("id")
    assert len(names) == len(set(names))
    for link in read.values("href"):
        assert link.startswith("#"), link
        assert link[1:] in names, link
    for value in [*read.values("clip-path"), *read.values("aria-describedby")]:
        assert value.removeprefix("url(#").rstrip(")") in names
    assert re.findall(r"https?:", shown) == []
    for part in ("BF16", "Scale rule floor", "gptq", "0.1.0"):
        assert part in shown
    charts = [attrs for tag, attrs in read.elements if tag == "svg"]
    assert len(charts) > 3
    assert all(c["role"] == "img" and c["aria-label"] and c["viewbox"] for c in charts)
    assert len(read.texts["figcaption"]) == len(charts) == len(read.texts["desc"])
    assert all(read.texts["figcaption"])
    assert all(read.texts["desc"])
    assert len(read.texts["table"]) == len(read.texts["thead"])
    assert all(text.strip() for text in read.texts["th"])


def test_markdown_of_an_old_record_is_what_the_verb_wrote_then() -> None:
    text = (RECORDS / "methods-reference.json").read_text(encoding="utf-8")
    written = (RECORDS / "methods-reference.md").read_text(encoding="utf-8")
    assert markdown_of(read_record(text, "")) == written


def test_the_same_record_gives_the_same_bytes_whatever_the_reader_has_set() -> None:
    import matplotlib

    results = Results(rows=(BASE, row(), row("hadamard", perplexity=2.5)), versions={})
    first = page(results)
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "axes.grid": True}):
        assert page(results) == first
    assert page(manifest()) == page(manifest())


def test_what_a_record_says_stays_text() -> None:
    rows = (
        BASE,
        row(EVIL, outliers=None, provenance={"model": EVIL, "recipe": {"rounding": EVIL}}),
        row("a", rounding=EVIL, scale_rule=EVIL, options={EVIL: EVIL}),
        row("b", site_errors={EVIL: 0.5, "x.0.<i>": 0.1}),
        row("c", scale_rule="log256", ocp=False, choices={EVIL: EVIL}),
    )
    record = Results(rows=rows, versions={EVIL: EVIL}, command=EVIL)
    choice = {"candidate": EVIL, "losses": {EVIL: 0.5, f"{EVIL}2": 0.75}, "at_least": {}}
    sites = [
        replace(each, site=f"m.{EVIL}.q", kind=EVIL, choice=choice) for each in manifest().sites
    ]
    named = manifest(
        sites=sites, method=EVIL, unfit={EVIL: 3}, files={EVIL: {"sha256": EVIL, "bytes": 3}}
    )
    for text in (page(record), page(named)):
        read = Reader(text)
        assert read.open == []
        assert len(read.texts["script"]) == 2
        assert "b" not in read.texts
        assert "i" not in read.texts
        assert EVIL.split("<b>")[0] in read.texts["main"][0]
        (kept,) = re.findall(
            r'<script type="application/json" id="record">(.*?)</script>', text, re.S
        )
        assert "<" not in kept
    assert Results.from_json(kept_record(page(record))) == record
    assert Manifest.from_json(kept_record(page(named)), "") == named
    assert "<script" not in markdown_of(named).replace("\\<", "")


def kept_record(text: str) -> str:
    found = re.search(r'<script type="application/json" id="record">(.*?)</script>', text, re.S)
    assert found
    return found[1]


def test_the_policy_lets_this_script_run_and_nothing_be_fetched() -> None:
    text = page(manifest())
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [
        attrs["content"] or ""
        for tag, attrs in Reader(text).elements
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert set(rules) == {
        "default-src", "style-src", "script-src", "img-src", "base-uri", "form-action"
    }  # fmt: skip


def test_numbers_stand_on_the_right_and_can_be_sorted() -> None:
    read = Reader(page(manifest()))
    kinds = [attrs for tag, attrs in read.elements if tag == "td"]
    assert any(attrs.get("data-value") == "0.02" for attrs in kinds)
    assert any(attrs.get("data-value") == "12345.0" for attrs in kinds)
    assert all(attrs.get("class") == "number" for attrs in kinds if "data-value" in attrs)


def test_long_names_break_at_their_options_and_short_ones_nowhere() -> None:
    lines = (("down_in", "qwen3-0.6b"), ("model.layers.0.down_in:a=b", "torq"))
    grid = Grid(title="names", columns=("site", "outliers"), lines=lines)
    parts = (Section(title="x", blocks=(grid,)),)
    drawn = document(Page(title="t", lead="l", sections=parts, record="{}", file="r.json"))
    assert '<th scope="row">down_in</th><td>qwen3-0.6b</td>' in drawn
    assert "model.<wbr>layers.<wbr>0.<wbr>down_<wbr>in:<wbr>a=<wbr>b" in drawn


def test_a_failed_method_is_shown_and_the_record_can_hold_what_json_cannot() -> None:
    rows = (BASE, row(perplexity=float("inf")), row("hadamard"), row("wush", perplexity=1.9))
    text = page(Results(rows=rows, versions={}))
    assert "+inf %" in text
    assert "-5.00 %" in text
    assert json.loads(kept_record(text))["rows"][1]["perplexity"] == float("inf")
    errors = [replace(each, output_error=float("inf")) for each in manifest().sites[:1]]
    assert "inf" in page(manifest(sites=errors))


def test_pages_of_little() -> None:
    """One row as `evaluate` writes it, with and without sites; no rows; no sites."""
    for rows in ((BASE,), (row(),), (row(site_errors={}, site_error=None),), ()):
        text = page(Results(rows=rows, versions={}))
        assert Reader(text).open == []
    assert text.count("<svg") == 0
    assert "No site was quantized" in page(manifest(sites=[]))


def test_a_file_name_that_is_no_text_can_be_written() -> None:
    text = document(replace(page_of(manifest()), title="a\udcffb"))
    text.encode("utf-8")
