"""Accuracies in the record and in tables, from the record alone."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from mxtorq.errors import UsageError
from mxtorq.evaluation.tasks import SUITES
from mxtorq.reports.accuracies import accuracies_markdown, accuracy_tables
from mxtorq.reports.render import markdown
from mxtorq.reports.schema import Results, Row


def result(value: float, **more: object) -> dict[str, object]:
    return {
        "metric": "acc_norm",
        "value": value,
        "stderr": 0.0125,
        "metrics": {"acc": 0.25, "acc_norm": value},
        "documents": 1838,
        "shots": 0,
        "version": "1.0",
        "truncated": 0,
        "prompts_sha256": "ab",
        **more,
    }


PLAIN = Row(
    method="bf16",
    rounding=None,
    scale_rule=None,
    perplexity=2.0,
    nll=0.7,
    predictions=9,
    seed=None,
    outliers=None,
    tasks={
        "piqa": result(0.5),
        "hellaswag:shots=10": result(0.25, shots=10, truncated=3),
        "arc_easy": result(0.125, stderr=None),
    },
    averages={"acc5": 0.375},
    provenance={"tasks": {"documents": "hub", "limit": None, "engine": "torch"}},
)
QUANTIZED = replace(
    PLAIN,
    method="torq",
    rounding="gptq",
    scale_rule="floor",
    tasks={"piqa": result(0.4375)},
    averages={},
    provenance={"tasks": {"documents": "hub", "limit": 50, "engine": "vllm"}},
)
RESULTS = Results(rows=(PLAIN, QUANTIZED), versions={"lm_eval": "9.8", "vllm": "7.6"}, command="x")


def test_there_and_back() -> None:
    assert Results.from_json(RESULTS.to_json()) == RESULTS


def test_a_record_from_before_there_were_tasks_is_read() -> None:
    content = json.loads(RESULTS.to_json())
    for row in content["rows"]:
        del row["tasks"], row["averages"]
    read = Results.from_json(json.dumps(content))
    assert [(row.tasks, row.averages) for row in read.rows] == [({}, {}), ({}, {})]
    assert accuracy_tables(read) == accuracies_markdown(read) == []
    assert "Accuracy" not in markdown(read)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("value", "0.5"),
        ("value", None),
        ("documents", 1.5),
        ("metrics", {"acc": "high"}),
        ("truncated", True),
        ("stderr", []),
        ("version", 1.0),
    ],
)
def test_a_damaged_result_is_refused(part: str, value: object) -> None:
    content = json.loads(RESULTS.to_json())
    content["rows"][1]["tasks"]["piqa"][part] = value
    with pytest.raises(UsageError, match=f"task 'piqa' with {part}"):
        Results.from_json(json.dumps(content))
    del content["rows"][1]["tasks"]["piqa"][part]
    with pytest.raises(UsageError, match=f"without {part}"):
        Results.from_json(json.dumps(content))
    content["rows"][1]["tasks"] = {"piqa": 0.5}
    with pytest.raises(UsageError, match="tasks"):
        Results.from_json(json.dumps(content))


def test_the_tables() -> None:
    page = io.StringIO()
    for table in accuracy_tables(RESULTS):
        Console(file=page, width=200).print(table)
    for shown in (page.getvalue(), "\n".join(accuracies_markdown(RESULTS))):
        lines = [line for line in shown.splitlines() if "piqa" in line]
        assert "1,838" in lines[0]
        assert "50.00 ± 1.25" in lines[0]
        assert "43.75 ± 1.25" in lines[0]
        (line,) = [line for line in shown.splitlines() if "hellaswag " in line]
        assert "10" in line
        assert "25.00 ± 1.25" in line
        assert " - " in line  # the other model was not asked
        (line,) = [line for line in shown.splitlines() if "arc_easy " in line]
        assert "12.50 " in line
        assert "±" not in line  # one document has no standard error
        assert "37.50" in shown
        assert "torq gptq" in shown
        assert "lm-evaluation-harness 9.8" in shown
        assert "plain mean of arc_challenge, arc_easy, hellaswag, piqa, winogrande" in shown
        assert "first 50 documents" in shown
        assert "torq gptq was asked through vllm 7.6" in shown
        assert "hellaswag:shots=10: 3 prompts were longer" in shown
    assert "Accuracy on tasks" in markdown(RESULTS)


def asked(method: str, seed: int, values: tuple[float, ...]) -> Row:
    """Asked the tasks of acc5."""
    labels = [task.label for task in SUITES["acc5"]]
    return replace(
        QUANTIZED,
        method=method,
        seed=seed,
        tasks={label: result(value) for label, value in zip(labels, values, strict=True)},
        averages={"acc5": sum(values) / 5},
        provenance={},
    )


def test_more_than_two_models_are_a_line_each() -> None:
    rows = (
        asked("hadamard", 0, (0.25, 0.5, 0.5, 0.75, 0.5)),
        asked("torq", 0, (0.25, 0.5, 0.5, 0.75, 0.25)),
        asked("torq", 1, (0.5, 0.5, 0.5, 0.75, 0.5)),
        replace(PLAIN, tasks={"piqa": result(0.625)}, averages={}, provenance={}),
    )
    page = io.StringIO()
    results = Results(rows=rows, versions={})
    for table in accuracy_tables(results):
        Console(file=page, width=250).print(table)
    for shown in (page.getvalue(), "\n".join(accuracies_markdown(results))):
        (line,) = [line for line in shown.splitlines() if "hadamard" in line]
        for cell in ("gptq", "floor", "50.00 ± 0.56", "75.00 ± 1.25"):  # 1.25 sqrt(5) / 5
            assert cell in line
        (line,) = [line for line in shown.splitlines() if "torq (2 seeds)" in line]
        for cell in ("50.00 ± 7.07", "37.50 ± 17.68", "75.00 ± 0.00"):  # sd of 45 and 55
            assert cell in line
        (line,) = [line for line in shown.splitlines() if "bf16" in line]
        assert "62.50 ± 1.25" in line
        assert line.count(" - ") == 7  # rounding, rule, the average and four tasks
        assert "of several seeds" in shown.lower()
        assert "piqa acc_norm (1,838 documents)" in " ".join(shown.split())
