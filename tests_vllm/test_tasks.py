"""vLLM answers tasks from the command line: the questions and accuracies of the torch path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: the extra `tasks`")

from mxtorq import pipeline
from mxtorq.config import EvaluationPlan, Recipe, parse_method
from mxtorq.evaluation.tasks import TaskPlan, parse_tasks
from mxtorq.reports.schema import Results
from vllm_engine import ENVIRONMENT, PATIENCE, PROGRAM

TASKS = "piqa,arc_easy"
DOCUMENTS = {
    "piqa": [
        {"goal": "open a jar", "sol1": "turn the lid", "sol2": "turn the table", "label": 0},
        {"goal": "How do I warm milk?", "sol1": "In a hat.", "sol2": "In a pot.", "label": 1},
        {"goal": "cut paper", "sol1": "with a spoon", "sol2": "with scissors", "label": 1},
    ],
    "arc_easy": [
        {"query": "Question: What falls from a cloud?", "choices": ["rain", "stones"], "gold": 0},
        {"query": "Question: Which can fly?", "choices": ["a horse", "a crow"], "gold": 1},
    ],
}


def test_the_engine_answers_as_the_torch_path(tmp_path: Path) -> None:
    """Sums in another order move a log-likelihood in its last bits, and no choice between these."""
    for name, rows in DOCUMENTS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    out = tmp_path / "out"
    recipe = Recipe(method=parse_method("hadamard"), calibration_tokens=256, seqlen=64)
    pipeline.quantize("reference", out, recipe, device="cpu")
    plan = TaskPlan(tasks=parse_tasks(TASKS), files=tmp_path)
    text = EvaluationPlan(eval_tokens=256, seqlen=64)
    (expected,) = pipeline.evaluate(str(out), text, device="cpu", tasks=plan).rows

    record = tmp_path / "record.json"
    program = PROGRAM.replace("vllm.entrypoints.cli.main", "mxtorq.cli").strip()
    (tmp_path / "program.py").write_text(  # workers import it again
        program.replace("\nmain()", "\nif __name__ == '__main__':\n    main()")
    )
    command = [sys.executable, str(tmp_path / "program.py"), "evaluate", str(out), "--json"]
    command += [str(record), "--tasks", TASKS, "--task-files", str(tmp_path), "--engine", "vllm"]
    command += ["--eval-tokens", "256", "--seqlen", "64", "--device", "cpu"]
    done = subprocess.run(
        command,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = Results.from_json(record.read_text())
    (row,) = results.rows
    assert "vllm" in results.versions
    assert row.provenance["tasks"]["engine"] == "vllm"
    assert row.tasks == expected.tasks
