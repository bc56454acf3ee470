"""Sizes, durations and the table as somebody reads them."""

import json

import pytest
from rich.console import Console

from mxtorq.reports.needs import Budget, Needs, duration, finished_of, in_units, table

NEEDS = Needs(
    model="a [b] model",
    out="out",
    device="cpu",
    budgets=(
        Budget(
            name="memory", phase="rounding", parts={"one": 10**9, "two": 3 * 10**9}, free=10**10
        ),
        Budget(name="disk", phase="writing", parts={"three": 5}, free=4),
    ),
    activation_memory=7,
    layers=8,
    finished=3,
    seconds=6600.0,
    notes=("A note.",),
)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (3_140_000_000, "3.1 GB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert in_units(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "about 1 s"),
        (59, "about 59 s"),
        (59.7, "about 1 min"),
        (130, "about 2 min"),
        (20 * 60, "about 20 min"),
        (58 * 60, "about 1 h"),
        (6600, "about 1 h 50 min"),
        (7200, "about 2 h"),
        (30.4 * 3600, "about 30 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(float(seconds)) == text


def test_what_is_finished() -> None:
    assert finished_of(3, 8) == "3 of 8 layers are finished"
    assert finished_of(1, 8) == "1 of 8 layers is finished"
    assert finished_of(1, 1) == "1 of 1 layer is finished"
    assert finished_of(2, None) == "2 layers are finished"


def test_the_table_has_every_part_and_the_record_every_figure() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(NEEDS))
    shown = captured.get()
    for words in ("a [b] model", "4.0 GB", "10.0 GB", "3.0 GB", "about 1 h 50 min", "A note."):
        assert words in shown
    assert shown.index("two") < shown.index("one")  # the largest first
    assert [budget.fits for budget in NEEDS.budgets] == [True, False]
    record = json.loads(NEEDS.to_json())
    assert record["budgets"][0]["needed"] == 4 * 10**9
    assert (record["layers"], record["finished"], record["seconds"]) == (8, 3, 6600.0)
