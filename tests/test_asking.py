"""A record with answers: written task by task, gone on with, and never mixed with others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: the extra `tasks`")

from mxtorq import asking, pipeline
from mxtorq.config import EvaluationPlan, Recipe, parse_method
from mxtorq.errors import UsageError
from mxtorq.evaluation.tasks import SUITES, TaskPlan, parse_tasks
from mxtorq.reports.schema import Results
from task_documents import DOCUMENTS

TASKS = ",".join(asked.name for asked in SUITES["acc5"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short document a task: the tiny models have 128 positions, a character each."""
    root = tmp_path_factory.mktemp("documents")
    for name in TASKS.split(","):
        text = "".join(json.dumps(row) + "\n" for row in DOCUMENTS[name])
        (root / f"{name}.jsonl").write_text(text)
    return root


def evaluate(model: Path, story: Path, **more: Any) -> tuple[Results, list[Results], list[str]]:
    """The results, what was saved on the way, and what was worked on."""
    saved: list[Results] = []
    stages: list[str] = []
    plan = EvaluationPlan(text=str(story), eval_tokens=256, seqlen=64)
    results = pipeline.evaluate(
        str(model),
        plan,
        device="cpu",
        save=saved.append,
        progress=lambda stage, done, total: stages.append(stage),
        **more,
    )
    return results, saved, stages


def test_a_run_goes_on_where_it_ended(
    tiny_folders: dict[str, Path], story: Path, folder: Path, tmp_path: Path
) -> None:
    tasks = TaskPlan(tasks=parse_tasks(TASKS), files=folder, limit=2)
    model = tiny_folders["qwen3"]
    whole, saved, _ = evaluate(model, story, tasks=tasks)
    assert [len(each.rows[0].tasks) for each in saved] == [0, 1, 2, 3, 4, 5]
    assert saved[-1] == whole
    (row,) = whole.rows
    values = [result["value"] for result in row.tasks.values()]
    assert row.averages == {"acc5": sum(values) / 5}
    assert {"lm_eval", "datasets", "torch"} <= whole.versions.keys()

    half = Results.from_json(saved[3].to_json())  # as it would be read from disk
    again, saved, stages = evaluate(model, story, tasks=tasks, done=half)
    assert again == whole
    assert "evaluate" not in stages  # nor is the perplexity computed again
    assert {*stages} == {"documents", "load", "piqa", "winogrande"}
    assert stages.index("documents") < stages.index("load")  # found before any work
    assert [len(each.rows[0].tasks) for each in saved] == [3, 4, 5]

    others = tmp_path / "others"
    shutil.copytree(folder, others)
    (others / "piqa.jsonl").write_text(json.dumps(DOCUMENTS["piqa"][0]) + "\n")
    for changes, found in (
        ({"tasks": replace(tasks, limit=None)}, "limit"),
        ({"tasks": replace(tasks, files=others)}, "changed since"),
        ({"model": tiny_folders["qwen2"]}, "weights_sha256"),
        ({"done": replace(whole, versions={**whole.versions, "lm_eval": "0"})}, "versions"),
    ):
        options: dict[str, Any] = {"model": model, "tasks": tasks, "done": whole, **changes}
        with pytest.raises(UsageError, match=found):
            evaluate(story=story, **options)


def test_a_checkpoint_is_asked_as_well(
    tiny_folders: dict[str, Path], story: Path, folder: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        method=parse_method("hadamard"), calibration=str(story), calibration_tokens=256, seqlen=64
    )
    out = tmp_path / "out"
    pipeline.quantize(str(tiny_folders["llama"]), out, recipe, device="cpu")
    tasks = TaskPlan(tasks=parse_tasks("piqa,winogrande"), files=folder)
    results, saved, _ = evaluate(out, story, tasks=tasks)
    (row,) = results.rows
    assert (row.method, list(row.tasks)) == ("hadamard", ["piqa", "winogrande"])
    again, _, stages = evaluate(out, story, tasks=tasks, done=saved[1])
    assert again == results
    assert {*stages} == {"documents", "load", "winogrande"}
    plain, _, _ = evaluate(tiny_folders["llama"], story, tasks=tasks)
    prompts = [
        {name: result["prompts_sha256"] for name, result in each.rows[0].tasks.items()}
        for each in (plain, results)
    ]
    assert prompts[0] == prompts[1]


def test_an_engine_reads_folders_and_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TaskPlan(tasks=parse_tasks("piqa"), engine="vllm")
    for model, outliers in (("reference", False), ("folder", True)):
        with pytest.raises(UsageError, match="in no folder"):
            asking.require_asked(None, plan, model, outliers)
    monkeypatch.setattr(asking, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="no package vllm"):
        asking.harness_versions(plan)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise asking.PackageNotFoundError(name)

    monkeypatch.setattr(asking, "version", missing)
    with pytest.raises(UsageError) as caught:
        pipeline.evaluate("reference", EvaluationPlan(), tasks=TaskPlan(tasks=parse_tasks("piqa")))
    assert caught.value.todo == "pip install 'mxtorq[tasks]'"
