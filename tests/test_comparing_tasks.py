"""Accuracies of every row of a comparison: those of evaluate, gone on with, and never mixed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: the extra `tasks`")

import mxtorq.comparison
from command import here
from mxtorq import pipeline
from mxtorq.comparison import compare
from mxtorq.config import EvaluationPlan, Recipe, parse_method
from mxtorq.errors import UsageError
from mxtorq.evaluation.tasks import TaskPlan, parse_tasks
from mxtorq.reports.schema import Results, Row
from task_documents import DOCUMENTS

TASKS = "piqa,winogrande"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("documents")
    for name in ("arc_challenge", "arc_easy", "hellaswag", *TASKS.split(",")):
        text = "".join(json.dumps(row) + "\n" for row in DOCUMENTS[name])
        (root / f"{name}.jsonl").write_text(text)
    return root


@pytest.fixture
def plan(story: Path) -> EvaluationPlan:
    return EvaluationPlan(text=str(story), eval_tokens=256, seqlen=64)


def recipe(story: Path, method: str, **more: Any) -> Recipe:
    small: dict[str, Any] = {"calibration": str(story), "calibration_tokens": 256, "seqlen": 64}
    return Recipe(method=parse_method(method), **small, **more)


def timeless(rows: tuple[Row, ...]) -> list[Row]:
    return [replace(row, search_seconds=None, quantize_seconds=None) for row in rows]


def test_every_row_is_asked_what_evaluate_asks(
    tiny_folders: dict[str, Path], story: Path, plan: EvaluationPlan, folder: Path, tmp_path: Path
) -> None:
    model = str(tiny_folders["llama"])
    tasks = TaskPlan(tasks=parse_tasks(TASKS), files=folder, limit=2)
    recipes = [recipe(story, "hadamard"), recipe(story, "hadamard", outliers="qwen3-0.6b")]
    saved: list[Results] = []
    whole = compare(model, recipes, plan, tasks=tasks, save=saved.append, device="cpu")
    assert [(row.method, row.outliers) for row in whole.rows] == [
        *(("bf16", None), ("hadamard", None)),
        *(("bf16", "qwen3-0.6b"), ("hadamard", "qwen3-0.6b")),
    ]
    assert all([*row.tasks] == TASKS.split(",") for row in whole.rows)
    assert [[len(row.tasks) for row in each.rows] for each in saved[:6]] == [
        *([0], [1], [2]),
        *([2, 0], [2, 1], [2, 2]),
    ]
    assert saved[-1] == whole
    assert whole.rows[0].tasks == whole.rows[2].tasks  # powers of two change no bit
    assert "lm_eval" in whole.versions

    pipeline.quantize(model, tmp_path / "out", recipes[0], device="cpu")
    for name, row in ((model, whole.rows[0]), (str(tmp_path / "out"), whole.rows[1])):
        (alone,) = pipeline.evaluate(name, plan, tasks=tasks, device="cpu").rows
        assert alone.tasks == row.tasks
        assert alone.provenance["tasks"] == row.provenance["tasks"]


def test_a_killed_run_asks_what_is_left(
    tiny_folders: dict[str, Path],
    story: Path,
    plan: EvaluationPlan,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the row that was being asked, the model is made again; its figures and answers stay."""
    model = str(tiny_folders["qwen3"])
    tasks = TaskPlan(tasks=parse_tasks("acc5"), files=folder, limit=1)
    recipes = [recipe(story, "identity"), recipe(story, "hadamard")]
    saved: list[Results] = []
    stages: list[str] = []

    def run(**options: Any) -> Results:
        saved.clear()
        stages.clear()
        return compare(
            model,
            recipes,
            plan,
            device="cpu",
            **{"save": saved.append, "tasks": tasks, **options},
            progress=lambda stage, done, total: stages.append(stage),
        )

    whole = run()
    assert [row.averages.keys() for row in whole.rows] == 3 * [{"acc5"}]
    row = whole.rows[2]
    assert row.averages["acc5"] == sum(each["value"] for each in row.tasks.values()) / 5
    half = Results.from_json(saved[-3].to_json())  # as it would be read from disk
    assert [len(row.tasks) for row in half.rows] == [5, 5, 3]
    before = half.to_json()
    again = run(done=half)
    assert again == whole  # the times of the search too: they are those of the earlier run
    assert half.to_json() == before  # what was passed is left as it was
    assert not any("evaluate" in stage or "identity" in stage for stage in stages)
    assert {stage.partition(": ")[2] for stage in stages if stage.startswith("hadamard")} == {
        *("quantize", "piqa", "winogrande")
    }
    assert "hadamard rtn: arc_easy" not in stages
    assert [len(each.rows[2].tasks) for each in saved] == [3, 4, 5]

    # A whole record is gone on with at once; tasks can be asked later, of rows and baseline.
    never = mxtorq.comparison.evaluate_recipe
    monkeypatch.setattr(mxtorq.comparison, "evaluate_recipe", None)
    assert run(done=whole) == whole
    assert run(done=whole, tasks=None) == whole
    monkeypatch.setattr(mxtorq.comparison, "evaluate_recipe", never)
    bare = run(tasks=None)
    assert "lm_eval" not in bare.versions
    assert timeless(run(done=bare).rows) == timeless(whole.rows)

    # A model that is not the same one again gets a new row.
    other = replace(half.rows[2], site_errors={"model.layers.0.qkv_in": 0.5}, perplexity=9.0)
    changed = replace(half, rows=(*half.rows[:2], other))
    assert timeless(run(done=changed).rows) == timeless(whole.rows)


def test_other_questions_are_refused(
    tiny_folders: dict[str, Path], story: Path, plan: EvaluationPlan, folder: Path, tmp_path: Path
) -> None:
    model, recipes = str(tiny_folders["llama"]), [recipe(story, "identity")]
    tasks = TaskPlan(tasks=parse_tasks("piqa"), files=folder, limit=1)
    done = compare(model, recipes, plan, tasks=tasks, device="cpu")
    (tmp_path / "piqa.jsonl").write_text(json.dumps(DOCUMENTS["piqa"][1]) + "\n")
    older = replace(done, versions={**done.versions, "lm_eval": "0.1"})
    changes: list[tuple[dict[str, Any], str]] = [
        ({"tasks": replace(tasks, limit=2)}, "'limit': 1"),
        ({"tasks": replace(tasks, files=tmp_path)}, "piqa on other documents"),
        ({"done": older}, "lm_eval 0.1"),
        ({"tasks": replace(tasks, engine="vllm")}, "in no folder"),
    ]
    for change, found in changes:
        with pytest.raises(UsageError) as caught:
            compare(model, recipes, plan, **{"tasks": tasks, "done": done, **change}, device="cpu")
        assert found in caught.value.found
        assert caught.value.todo


def test_the_command_prints_writes_and_sets_beside_published_ones(
    tiny_folders: dict[str, Path], story: Path, folder: Path, tmp_path: Path
) -> None:
    model = tiny_folders["llama"]
    (tmp_path / "figures.toml").write_text(
        f'[models.tiny]\nnames = ["{model.name}"]\n'
        '[protocols.one]\nsource = "A paper"\naverage = "acc5"\n'
        '[[baseline]]\nmodel = "tiny"\nprotocol = "one"\naccuracy = 70.25\n'
        '[[row]]\nmodel = "tiny"\nprotocol = "one"\ncalled = "direct"\nmethod = "identity"\n'
        'rounding = "rtn"\nscale_rule = "floor"\naccuracy = 64.5\n'
    )
    small = ("--calibration", story, "--calibration-tokens", 128, "--seqlen", 64)
    small = (*small, "--text", story, "--eval-tokens", 128, "--methods", "identity")
    record, table = tmp_path / "record.json", tmp_path / "table.md"
    asked = ("--tasks", "acc5", "--task-files", folder, "--limit", 2)
    done = here(
        *("compare", model, *small, *asked, "--json", record, "--markdown", table),
        *("--against", tmp_path / "figures.toml"),
    )
    assert done.returncode == 0, done.stderr
    rows = Results.from_json(record.read_text()).rows
    assert len(rows) == 2
    for text in (done.stdout, table.read_text(encoding="utf-8")):
        for row in rows:
            for result in row.tasks.values():
                assert f"{100 * result['value']:.2f}" in text
            assert f"{100 * row.averages['acc5']:.2f}" in text
        assert "acc5 in %" in text
        assert "2 documents of each task here" in text
        assert f"{100 * rows[1].averages['acc5'] - 64.5:+.2f}" in text
        assert "70.25" in text
    done = here("compare", model, *small, "--limit", 2)
    assert done.returncode == 1
    assert "--tasks acc7" in done.stderr
