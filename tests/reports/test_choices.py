"""What was chosen: counted by candidate and kind, compared without claiming more than is known."""

import json
import math
from collections.abc import Mapping

import pytest

from mxtorq.export.manifest import SiteEntry
from mxtorq.reports.choices import (
    Times,
    brief,
    candidates_of,
    choice_notes,
    counts,
    median_times,
    verdicts,
)
from mxtorq.reports.render import footnote, markdown
from mxtorq.reports.schema import Results, Row


def entry(
    site: str,
    candidate: str | None,
    losses: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
) -> SiteEntry:
    choice = {"candidate": candidate, "losses": losses or {}, "at_least": at_least or {}}
    return SiteEntry(
        site=site,
        linears=["a"],
        width=64,
        kind="chain",
        multiply_adds=5,
        extra_bytes=7,
        output_error=0.25,
        choice=None if candidate is None else choice,
    )


ENTRIES = [
    entry("m.0.qkv_in", "wush", {"wush": 0.5, "layer-32": 0.75}, {"identity": 0.625}),
    entry("m.0.down_in", "layer-32", {"layer-32": 0.25, "wush": 0.5, "identity": 1.0}),
    entry("m.1.qkv_in", "layer-32", {"layer-32": 1.0}, {"wush": 1.5}),
    entry("m.1.down_in", None),
]
CHOSEN = {"m.0.qkv_in": "wush", "m.0.down_in": "layer-32", "m.1.qkv_in": "layer-32"}


def row(seed: int, choices: dict[str, str], method: str = "mxtorq", **changes: object) -> Row:
    values: dict[str, object] = {
        "method": method,
        "rounding": "gptq",
        "scale_rule": "floor",
        "perplexity": 3.0,
        "nll": 1.0,
        "predictions": 9,
        "seed": seed,
        "outliers": None,
        "choices": choices,
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


def test_candidates_are_counted_by_kind_the_most_taken_first() -> None:
    assert candidates_of(ENTRIES) == CHOSEN
    assert list(counts(CHOSEN).items()) == [
        ("layer-32", {"qkv_in": 1, "down_in": 1}),
        ("wush", {"qkv_in": 1, "down_in": 0}),
    ]
    assert counts(CHOSEN, {"m.0.qkv_in": "wush", "m.1.qkv_in": "wush"}) == {
        "wush": {"qkv_in": 3, "down_in": 0},
        "layer-32": {"qkv_in": 1, "down_in": 1},
    }
    assert counts() == counts({}) == {}
    assert brief(CHOSEN) == "layer-32 at 2 of 3 sites, wush at 1"
    assert brief({"m.0.o_in": "wush"}) == "wush at 1 of 1 site"
    assert brief() == ""


def test_other_candidates_lose_so_many_times_or_at_least_so_many() -> None:
    first, second, third = verdicts(ENTRIES)
    assert first.runner_up == "identity"  # may be nearer than layer-32, so that it counts as such
    assert first.others["identity"].more == ">= +25.00 %"
    assert str(first.against("identity")) == ">= 1.25 x"
    assert first.against("wush") == Times(1.0, exact=True)
    assert second.runner_up == "wush"
    assert second.others["wush"].more == "+100.00 %"
    assert str(second.against("identity")) == "4.00 x"
    assert third.against("identity") is None
    assert median_times([first, second, third], "identity") == Times(2.625, exact=False)
    assert median_times([second], "identity") == Times(4.0, exact=True)
    assert median_times([third], "identity") is None
    (alone,) = verdicts([entry("m.0.o_in", "wush", {"wush": 0.5})])
    assert alone.runner_up is None


def test_a_site_that_loses_nothing_and_one_that_paid_for_less() -> None:
    exact = entry("m.0.o_in", "wush", {"wush": 0.0, "perq": 0.0, "identity": 0.5})
    cheap = entry("m.1.o_in", "wush", {"wush": 1.0, "layer-32": 0.9})
    nothing, paid = verdicts([exact, cheap])
    assert nothing.others == {"perq": Times(1.0, True), "identity": Times(math.inf, True)}
    assert str(nothing.others["identity"]) == "inf x"
    assert paid.others["layer-32"].more == "-10.00 %"


def test_rows_tell_their_choices_over_all_seeds() -> None:
    rows = (
        row(0, CHOSEN),
        row(1, {"m.0.qkv_in": "wush"}),
        row(2, {}),  # of a record in which they were not kept
        row(0, {}, method="wush"),
        row(0, {"m.0.qkv_in": "hires"}, outliers="llm"),
    )
    results = Results(rows=rows, versions={})
    assert choice_notes(results) == [
        "Chosen by mxtorq, gptq, scale rule floor, 2 seeds: wush at 2 of 4 sites, layer-32 at 2.",
        "Chosen by mxtorq, outliers llm, gptq, scale rule floor: hires at 1 of 1 site.",
    ]
    for note in choice_notes(results):
        assert note in footnote(results)
        assert note in markdown(results)
    assert Results.from_json(results.to_json()) == results


def test_rows_of_older_records_have_none_and_others_are_refused() -> None:
    content = json.loads(Results(rows=(row(0, CHOSEN),), versions={}).to_json())
    del content["rows"][0]["choices"]
    (old,) = Results.from_json(json.dumps(content)).rows
    assert old == row(0, {})
    assert choice_notes(Results(rows=(old,), versions={})) == []
    content["rows"][0]["choices"] = {"m.0.qkv_in": 3}
    with pytest.raises(Exception, match="choices"):
        Results.from_json(json.dumps(content))
