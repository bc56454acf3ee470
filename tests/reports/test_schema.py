"""Records go to JSON and back, versions are checked, and the table says what it must."""

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from mxtorq.errors import UsageError
from mxtorq.reports.render import cells, footnote, markdown, parts, site_tables, terminal
from mxtorq.reports.schema import VERSION, Results, Row, sqnr_db

EVALUATION = {"source": "t", "tokens": 100, "seqlen": 10, "text_sha256": "a"}
CALIBRATION = {"source": "c", "tokens": 50, "seqlen": 10, "text_sha256": "b", "seed": 4}


def row(method: str, perplexity: float, outliers: str | None = None, **more: object) -> Row:
    plain = method == "bf16"
    provenance = {"evaluation": EVALUATION, "baseline_dtype": "bfloat16", "compute_dtype": "x"}
    if not plain:
        provenance["calibration"] = CALIBRATION
    values: dict[str, object] = {
        "method": method,
        "rounding": None if plain else "rtn",
        "scale_rule": None if plain else "floor",
        "perplexity": perplexity,
        "nll": 1.0,
        "predictions": 9,
        "seed": None if plain else 4,
        "outliers": outliers,
        "provenance": provenance,
        **more,
    }
    return Row(**values)  # type: ignore[arg-type]


RESULTS = Results(
    rows=(
        row("bf16", 2.0),
        row(
            "torq",
            2.5,
            kl=0.25,
            site_error=0.01,
            multiply_adds_per_token=1234,
            extra_bytes=5678,
            search_seconds=0.5,
            quantize_seconds=1.5,
        ),
        row("bf16", 4.0, "wild"),
        row("identity", 5.0, "wild"),
    ),
    versions={"mxtorq": "0"},
    command="mxtorq compare",
)


def test_there_and_back() -> None:
    assert Results.from_json(RESULTS.to_json()) == RESULTS
    content = json.loads(RESULTS.to_json())
    assert content["version"] == VERSION
    for line in content["rows"]:
        assert {"method", "rounding", "scale_rule", "perplexity", "seed", "provenance"} <= set(line)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": "mxtorq.results", "version": 99}'])
def test_other_records_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="version 1"):
        Results.from_json(text)


def edited(**changes: object) -> str:
    """The record with other values in its second row."""
    content = json.loads(RESULTS.to_json())
    content["rows"][1].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perplexity": "2.5"}, "perplexity is of type float"),
        ({"perplexity": 0.5}, "perplexity 0.5"),
        ({"site_error": -0.1}, "site errors from -0.1"),
        ({"site_errors": {"a": -1.0}}, "site errors from -1"),
        ({"provenance": {"evaluation": 5}}, "evaluation = 5"),
        ({"provenance": {"evaluation": {"source": "t"}}}, "evaluation without tokens"),
        ({"options": []}, "options is of type dict"),
        ({"agreement": 1.5}, "an agreement of 1.5"),
        ({"layer_errors": {"a": -0.5}}, "errors from -0.5"),
        ({"windows": {"nll": [9.0, "1"]}}, "windows is of type"),
        ({"windows": {"kl": [2.25]}}, "windows of"),
        ({"windows": {"nll": [4.5, 4.5]}}, "9 predictions in 2 windows"),
        ({"windows": {"nll": [3.0, 3.0, 3.0], "kl": [2.25]}}, "windows of"),
        ({"windows": {"nll": [9.0]}, "predictions": 0}, "0 predictions in 1 windows"),
        ({"windows": {"nll": [3.0, 3.0, 3.5]}}, "nll 1.0, and windows with a mean of 1.05"),
        ({"windows": {"nll": [9.0], "agreement": [9.0]}}, "agreement None"),
        ({"seed": 2**63}, "seed is of type"),
    ],
)
def test_values_of_a_record_have_their_types(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Results.from_json(edited(**changes))


def test_figures_of_windows_go_there_and_back() -> None:
    sums = {"nll": [2.0, 3.0, 4.0], "kl": [0.25, 1.0, 1.0], "agreement": [3, 2, 1]}
    more = {"agreement": 6 / 9, "kl_p99": 1.5, "windows": sums, "layer_errors": {"m.0": 0.5}}
    read = Results.from_json(edited(**more)).rows[1]
    assert (read.windows, read.kl_p99, read.layer_errors) == (sums, 1.5, {"m.0": 0.5})


def test_a_record_may_have_further_fields_and_no_points() -> None:
    read = Results.from_json(edited(perplexity=3, later=True))
    assert (type(read.rows[1].perplexity), read.rows[1].perplexity) == (float, 3.0)


def test_perplexities_that_overflow_and_names_with_brackets_are_shown() -> None:
    rows = [row("[/b] [red", value, seed=at) for at, value in enumerate((math.inf, math.inf))]
    few = row("a", 3.0, seed=1, site_errors={"x.qkv_in": 0.1})
    more = row("a", 3.0, seed=2, site_errors={"x.down_in": 0.1})
    results = Results(rows=(row("bf16", 2.0), *rows, few, more), versions={})
    console = Console(file=io.StringIO(), width=300)
    console.print(terminal(results, "title"))
    assert "[/b] [red (2 seeds)" in console.file.getvalue()  # type: ignore[attr-defined]
    assert cells(results)[1][4:6] == ["inf", "+inf ± nan %"]
    assert "x.qkv_in (10.00 dB)" in markdown(results)


def test_ratios_are_to_the_baseline_with_the_same_outliers() -> None:
    table = cells(RESULTS)
    assert table[0][5] == "-"
    assert table[1][5] == "+25.00 %"
    assert table[3][5] == "+25.00 %"
    assert table[1][6:8] == ["-", "-"]  # there are no windows to tell from
    assert table[1][8:] == ["0.2500", "20.00 dB", "1,234", "5,678", "0.5", "1.5"]


def test_seeds_become_one_line_with_their_spread() -> None:
    """The sample standard deviation of 2, 4 and 6 is 2."""
    values = [
        row("torq", value, seed=seed, multiply_adds_per_token=1000 * seed, extra_bytes=5)
        for seed, value in enumerate((2.0, 4.0, 6.0))
    ]
    other = row("torq", 3.0, rounding="gptq", multiply_adds_per_token=None)
    results = Results(rows=(row("bf16", 2.0), *values, other), versions={})
    table = cells(results)
    assert len(table) == 3
    assert "50 tokens, seeds 0, 1, 2, 4." in footnote(results)
    assert table[1][0] == "torq (3 seeds)"
    assert table[1][4] == "4.0000 ± 2.0000"
    assert table[1][5] == "+100.00 ± 100.00 %"
    assert table[1][10:12] == ["1,000", "5"]  # a method may choose other transforms for each seed
    assert table[2][:5] == ["torq", "none", "gptq", "floor", "3.0000"]
    assert table[2][10] == "-"


def test_scales_that_no_hardware_has_stand_apart() -> None:
    strange = row("identity", 2.1, scale_rule="log256", ocp=False)
    rows = (*RESULTS.rows[:2], strange, *RESULTS.rows[2:])
    results = replace(RESULTS, rows=rows)
    (first, strict), (second, other) = parts(results)
    assert "OCP" in first
    assert "no hardware has" in second
    assert strict.rows == RESULTS.rows
    assert other.rows == (RESULTS.rows[0], strange)
    text = markdown(results)
    assert text.index("+25.00 %") < text.index("no hardware has") < text.index("log256")
    assert "no hardware" not in markdown(RESULTS)


def test_the_footnote_tells_what_makes_figures_doubtful() -> None:
    note = footnote(RESULTS)
    assert "Perplexity on 't': 100 tokens, windows of 10" in note
    assert "seed 4" in note
    assert "Not a measurement of that LLM" in note
    assert "optimistic" not in note
    same = row("torq", 2.0)
    same.provenance["calibration"] = {**CALIBRATION, "text_sha256": "a"}
    same.provenance["unfit"] = {"model.layers.0.down_in": 172}
    note = footnote(Results(rows=(same,), versions={}))
    assert "optimistic" in note
    assert "model.layers.0.down_in (width 172) stays in BF16" in note


def test_renderings_hold_every_cell() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal(RESULTS, "title"))
    for text in (console.export_text(), markdown(RESULTS)):
        for line in cells(RESULTS):
            assert all(cell in text for cell in line)
    assert markdown(RESULTS).startswith("    mxtorq compare\n")


def test_an_evaluation_shows_no_column_without_any_value_and_no_note_of_it() -> None:
    """A model on its own has nothing to be compared with. A comparison keeps its columns."""
    console = Console(width=200, record=True, file=io.StringIO())
    alone = Results(rows=(row("bf16", 2.0),), versions={})
    console.print(terminal(alone, "title"))
    for text in (console.export_text(), markdown(alone)):
        assert "perplexity" in text
        assert "Perplexity on 't'" in text
        for name in ("scale rule", "vs BF16", "95 %", "vs best", "KL", "MACs", "search", "±"):
            assert name not in text, name
    quantized = row("torq", 2.5, windows={"nll": [9.0]}, multiply_adds_per_token=12)
    text = markdown(Results(rows=(quantized,), versions={}))
    assert "| method | outliers | rounding | scale rule | perplexity | MACs |" in text
    assert "MACs: what the transforms multiply online" in text
    for name in ("vs BF16", "95 %", "vs best", "KL", "total s"):
        assert name not in text, name
    assert "| vs BF16 | 95 % | vs best | KL |" in markdown(RESULTS)


def test_markdown_says_where_a_method_loses() -> None:
    """The mean over layers and seeds of each kind of site, and the worst site of all."""
    values = [
        row("torq", 2.5, seed=seed, site_errors={"m.0.qkv_in": a, "m.1.qkv_in": b, "m.0.o_in": 0.1})
        for seed, (a, b) in enumerate(((0.01, 0.03), (0.01, 0.35)))
    ]
    text = "".join(site_tables(Results(rows=(row("bf16", 2.0), *values), versions={})))
    assert "| method | outliers | rounding | scale rule | qkv_in | o_in | worst site |" in text
    # (0.01 + (0.03 + 0.35) / 2) / 2 = 0.1
    assert "| torq (2 seeds) | none | rtn | floor | 10.00 dB | 10.00 dB | m.1.qkv_in" in text
    assert site_tables(RESULTS) == []


def test_a_narrow_terminal_loses_columns_and_cuts_no_figure() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal(RESULTS, "title", 80))
    text = console.export_text()
    assert "Left out for want of width: search s, bytes" in text
    assert "…" not in text
    for line in cells(RESULTS):
        assert all(cell in text for cell in line[:6])


def test_sqnr() -> None:
    assert sqnr_db(0.01) == 20.0
    assert sqnr_db(0.0) == math.inf
