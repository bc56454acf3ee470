"""A report in a real browser: nothing complains, everything is seen, also on a phone and offline.

Needs a Chromium on this machine (Debian: ``apt-get install chromium``) and skips without one.
"""

import math
import random
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from browser import Tab
from inspections import INSPECTION
from mxtorq.evaluation.tasks import SUITES
from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.reports.html import page
from mxtorq.reports.pages import read_record
from mxtorq.reports.published import read_published
from mxtorq.reports.schema import Results, Row

pytest.importorskip("matplotlib", reason="charts need the extra `report`")

RECORDS = Path(__file__).parents[2] / "docs" / "results"
CHARTS = """[...document.querySelectorAll("svg")].map((svg) => {
  const box = svg.getBoundingClientRect();
  const words = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
  const card = svg.closest("figure").getBoundingClientRect();
  return {
    width: box.width, height: box.height,
    outside: words.filter((w) => w.left < card.left - 1 || w.right > card.right + 1).length,
  };
})"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    text = (RECORDS / "methods-reference.json").read_text(encoding="utf-8")
    path.write_text(page(read_record(text, "")), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)]
)
def test_a_report_opens_without_a_complaint_and_fits(
    browser: Tab, report: Path, width: int, dark: bool
) -> None:
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(report, width, dark=dark)
    assert browser.complaints == []
    assert browser.requests == [report.as_uri()]
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") == width
    charts: list[dict[str, Any]] = browser.value(CHARTS)
    assert len(charts) > 10
    for chart in charts:
        assert chart["width"] > 250
        assert chart["height"] > 50
        assert chart["outside"] == 0
    light = browser.value(
        "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)[0] > 127"
    )
    assert light is not dark


def test_an_inspection_opens_without_a_complaint_and_fits(browser: Tab, tmp_path: Path) -> None:
    path = tmp_path / "inspection.html"
    path.write_text(page(INSPECTION), encoding="utf-8")
    for width in (1280, 400):
        browser.complaints.clear()
        browser.open(path, width)
        assert browser.complaints == []
        assert browser.value("document.documentElement.scrollWidth") == width
        charts: list[dict[str, Any]] = browser.value(CHARTS)
        assert len(charts) == 5
        assert all(chart["width"] > 250 and chart["height"] > 50 for chart in charts)
        assert all(chart["outside"] == 0 for chart in charts)


def test_accuracies_intervals_and_published_figures_fit(browser: Tab, tmp_path: Path) -> None:
    """A record of `compare --tasks` beside published figures, also with its folds open."""
    draw = random.Random(0)
    text = {"source": "wikitext2", "tokens": 81, "seqlen": 10}
    rows = []
    for method, rule in product(("bf16", "torq", "duquant++:steps=8:block=32"), ("floor", "even")):
        losses = [draw.uniform(5.0, 9.0) for _ in range(9)]
        tasks = {
            task.label: {
                "metric": "acc_norm",
                "value": draw.random(),
                "stderr": 0.02,
                "metrics": {},
                "documents": 9,
                "shots": 0,
                "truncated": 0,
                "version": "1",
                "prompts_sha256": "a",
            }
            for task in SUITES["acc7"]
        }
        plain = method == "bf16"
        row = Row(
            method=method,
            rounding=None if plain else "gptq",
            scale_rule=None if plain else rule,
            perplexity=math.exp(sum(losses) / 81),
            nll=sum(losses) / 81,
            predictions=81,
            seed=None if plain else 0,
            outliers=None,
            windows={"nll": losses},
            tasks=tasks,
            averages={"acc7": sum(each["value"] for each in tasks.values()) / 7},
            provenance={"model": "Llama-3-8B", "evaluation": text},
        )
        rows += [] if plain and rule == "even" else [row]
    path = tmp_path / "tasks.html"
    published = read_published(RECORDS.parent / "published.toml")
    record = Results(rows=tuple(rows), versions={"lm_eval": "1"})
    path.write_text(page(record, published), encoding="utf-8")
    for width, dark in ((1280, False), (400, True)):
        browser.complaints.clear()
        browser.open(path, width, dark=dark)
        browser.value("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        assert browser.complaints == []
        assert browser.value("document.documentElement.scrollWidth") == width
        charts: list[dict[str, Any]] = browser.value(CHARTS)
        assert len(charts) == 2 * (1 + 1 + 7)
        assert all(chart["width"] > 250 and chart["height"] > 50 for chart in charts)
        assert all(chart["outside"] == 0 for chart in charts)
        titles = browser.value("[...document.querySelectorAll('h2')].map((e) => e.textContent)")
        assert {"Beside published figures", "Accuracy on tasks"} <= set(titles)


def test_choices_fit(browser: Tab, tmp_path: Path) -> None:
    """Of a deep model with seven kinds of sites and all candidates, with the folds open."""
    kinds = ("qkv_in", "o_in", "gate_up_in", "down_in", "q_b_in", "kv_b_in", "experts_gate_up_in")
    names = [f"perq-order/layer-{at}" for at in range(16)]
    sites = []
    for at, (layer, kind) in enumerate(product(range(40), kinds)):
        losses = {name: 0.5 + 0.01 * other for other, name in enumerate(names)}
        sites.append(
            SiteEntry(
                site=f"model.layers.{layer}.{kind}",
                linears=["a"],
                width=64,
                kind="chain",
                multiply_adds=5,
                extra_bytes=7,
                output_error=0.01,
                choice={
                    "candidate": names[at % 16],
                    "losses": losses,
                    "at_least": {"identity": 1.5, "wush": 0.75},
                },
            )
        )
    record = Manifest(
        method="mxtorq",
        rounding="gptq",
        recipe={"method": {}, "rounding": {}},
        scale_rules={"weights": "floor", "activations": "floor"},
        seed=0,
        source={"model": "m", "family": "llama", "baseline_dtype": "bf16", "outliers": None},
        calibration={"source": "stdlib", "tokens": 64, "seqlen": 32, "seed": 0},
        versions={},
        sites=sites,
        unfit={},
        files={},
    )
    path = tmp_path / "choices.html"
    path.write_text(page(record), encoding="utf-8")
    for width, dark in ((1280, False), (400, True)):
        browser.complaints.clear()
        browser.open(path, width, dark=dark)
        browser.value("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        assert browser.complaints == []
        assert browser.value("document.documentElement.scrollWidth") == width
        charts: list[dict[str, Any]] = browser.value(CHARTS)
        assert len(charts) == 2
        assert all(chart["width"] > 250 and chart["height"] > 50 for chart in charts)
        assert all(chart["outside"] == 0 for chart in charts)


def test_words_of_charts_can_be_read_in_both_modes(browser: Tab, report: Path) -> None:
    """Contrast by WCAG 2.2: 4.5 to 1 against the card for letters, 3 to 1 for marks."""
    contrast = """(() => {
      const light = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map((part) => {
        const c = part / 255;
        return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
      }).reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
      const card = light(getComputedStyle(document.querySelector("figure")).backgroundColor);
      const against = (colour) => {
        const [a, b] = [light(colour), card].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
      };
      const least = (selector, of) => Math.min(
        ...[...document.querySelectorAll(selector)].map((e) => against(getComputedStyle(e)[of])));
      const probe = document.body.appendChild(document.createElement("p"));
      const series = [1, 2, 3, 4, 5, 6].map((at) => {
        probe.style.color = `var(--series-${at})`;
        return against(getComputedStyle(probe).color);
      });
      return {letters: least("svg text", "fill"), marks: Math.min(...series)};
    })()"""
    for dark in (False, True):
        browser.open(report, 1280, dark=dark)
        found = browser.value(contrast)
        assert found["letters"] >= 4.5
        assert found["marks"] >= 3


def test_tables_sort_by_click_and_by_key(browser: Tab, report: Path) -> None:
    browser.open(report, 1280)
    cells = "[...document.querySelectorAll('table')[0].tBodies[0].rows].map((r) => r.cells[%d].%s)"
    head = "document.querySelectorAll('table')[0].tHead.rows[0].cells[%d]"
    name = [text.strip() for text in browser.value(
        "[...document.querySelectorAll('table')[0].tHead.rows[0].cells].map((c) => c.textContent)"
    )]  # fmt: skip
    loss = name.index("vs BF16")
    before = browser.value(cells % (loss, "textContent"))
    browser.value(f"{head % loss}.querySelector('button').click()")
    assert browser.value(f"{head % loss}.getAttribute('aria-sort')") == "ascending"
    after = browser.value(cells % (loss, "textContent"))
    assert sorted(after) == sorted(before)
    figures = [float(text.split()[0]) for text in after if text != "-"]
    assert figures == sorted(figures)
    assert after[len(figures) :] == ["-"] * (len(after) - len(figures))

    browser.value(f"{head % loss}.querySelector('button').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                     windowsVirtualKeyCode=13)  # fmt: skip
    assert browser.value(f"{head % loss}.getAttribute('aria-sort')") == "descending"
    downward = browser.value(cells % (loss, "textContent"))
    assert [float(text.split()[0]) for text in downward[: len(figures)]] == figures[::-1]
    assert downward[len(figures) :] == after[len(figures) :]

    browser.value(f"{head % 0}.querySelector('button').click()")
    methods = browser.value(cells % (0, "textContent"))
    assert methods == sorted(methods)
    assert browser.value(f"{head % loss}.getAttribute('aria-sort')") is None


def test_the_switch_works_and_the_record_is_saved(
    browser: Tab, report: Path, tmp_path: Path
) -> None:
    browser.complaints.clear()
    browser.open(report, 400)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser.value(paper)
    browser.value("document.getElementById('theme').click()")
    assert browser.value(paper) != light
    browser.value("document.getElementById('theme').click()")
    assert browser.value(paper) == light
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.value("document.getElementById('save').click()")
    saved, end = tmp_path / "results.json", time.monotonic() + 20
    while not saved.exists() and time.monotonic() < end:
        browser.value("1")
        time.sleep(0.05)
    original = (RECORDS / "methods-reference.json").read_text(encoding="utf-8")
    assert read_record(saved.read_text(encoding="utf-8"), "") == read_record(original, "")
    assert browser.complaints == []


def test_the_measurements_can_fail(browser: Tab, tmp_path: Path) -> None:
    """A page that throws, asks for something and is too wide is found out in all three."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'>"
        "<div style='width:900px'>x</div><script>console.error('a');throw new Error('b')</script>"
        "<img src='http://127.0.0.1:9/c.png'>"
    )
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(path, 400)
    assert len(browser.complaints) >= 3
    assert "http://127.0.0.1:9/c.png" in browser.requests
    assert browser.value("document.documentElement.scrollWidth") > 400
