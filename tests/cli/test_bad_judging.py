"""What evaluate, compare and report refuse: each with four parts, before anything is written."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny_models
from command import here
from mxtorq.reports.schema import Results
from task_documents import DOCUMENTS

needs_tasks = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs the lm-evaluation-harness: the extra `tasks`"
)


def refused(*arguments: object, says: tuple[str, ...]) -> None:
    done = here(*arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    for part in ("asked:", "found:", "why:", "to do:", *says):
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("piqa", "lambada_openai"):
        lines = [json.dumps(row) + "\n" for row in DOCUMENTS[name]]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@needs_tasks
@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_an_unknown_task(verb: str, tiny_folders: dict[str, Path], documents: Path) -> None:
    asked = (verb, tiny_folders["llama"], "--task-files", documents, "--tasks")
    refused(*asked, "lambada_opena", says=("did you mean lambada_openai",))
    refused(*asked, "piqa,winogrande", says=("winogrande.jsonl", "lambada_openai.jsonl, piqa"))
    refused(*asked, "piqa:shot=3", says=("did you mean 'shots'",))
    refused(*asked, "mmlu", says=("mmlu.jsonl", "lambada_openai.jsonl, piqa.jsonl there"))
    refused(*asked, "acc4", says=("mmlu_cot_llama.jsonl or mmlu.jsonl",))
    refused(*asked, ",", says=("there is nothing to ask",))


def without(model: Path, *names: str, to: Path) -> Path:
    """A copy of a tiny model whose tokenizer lacks these tokens."""
    tiny_models.save(tiny_models.build("llama"), to)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name in names:
        setattr(tokenizer, f"{name}_token", None)
    tokenizer.save_pretrained(to)
    return to


@needs_tasks
def test_a_tokenizer_without_bos_and_eos(
    tiny_folders: dict[str, Path], story: Path, documents: Path, tmp_path: Path
) -> None:
    """Tasks need one of them. Perplexity needs neither: BOS only opens documents where there is
    one."""
    model = without(tiny_folders["llama"], "bos", "eos", to=tmp_path / "neither")
    small = ("--text", story, "--seqlen", 64, "--eval-tokens", 128)
    asked = ("--tasks", "piqa,lambada_openai", "--task-files", documents, "--limit", 1)
    refused("evaluate", model, *small, *asked, says=("neither a BOS nor an EOS", "bos_token"))
    calibrated = ("--calibration", story, "--calibration-tokens", 128, "--methods", "identity")
    refused("compare", model, *small, *asked, *calibrated, says=("neither a BOS nor an EOS",))
    assert here("evaluate", model, *small).returncode == 0
    only_eos = without(tiny_folders["llama"], "bos", to=tmp_path / "eos")
    done = here("evaluate", only_eos, *small, *asked)
    assert done.returncode == 0, done.stderr
    assert "lambada_openai" in done.stdout


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_a_text_that_is_shorter_than_a_window(
    verb: str, tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    text = (verb, tiny_folders["llama"], "--text", short)
    refused(*text, says=("128 evaluation tokens", "11 tokens, 0 whole windows", "--seqlen"))
    long = (verb, tiny_folders["llama"], "--text", story, "--seqlen", 64)
    refused(*long, "--eval-tokens", 63, says=("63 evaluation tokens in windows of 64",))
    refused(*long, "--eval-tokens", 10**6, says=("whole windows", "a longer text"))
    if verb == "compare":
        calibrated = ("--text", story, "--seqlen", 64, "--calibration", short)
        refused(*text[:2], *calibrated, says=("calibration tokens", "11 tokens"))


def test_a_record_of_another_version(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """Of the schema, of a package, of another program, and cut short."""
    model, record = tiny_folders["llama"], tmp_path / "record.json"
    small = ("--text", story, "--seqlen", 64, "--eval-tokens", 128)
    compared = ("compare", model, *small, "--methods", "identity", "--calibration", story)
    compared = (*compared, "--calibration-tokens", 128, "--json", record)
    assert here(*compared).returncode == 0
    text = record.read_text()
    good = Results.from_json(text)
    content: dict[str, Any] = json.loads(text)

    record.write_text(json.dumps({**content, "version": 2}))
    for arguments in ((*compared, "--resume"), ("report", record, "--markdown", tmp_path / "x")):
        teaching = (
            "reads mxtorq.results version 1",
            str(record),
            "the release of mxtorq that wrote",
        )
        refused(*arguments, says=("version 2", *teaching))
    older = replace(good, versions={**good.versions, "torch": "1.0", "numpy": "1.1"})
    record.write_text(older.to_json())
    evaluated = ("evaluate", model, *small, "--json", record, "--resume")
    for arguments in ((*compared, "--resume"), evaluated):
        refused(*arguments, says=("numpy 1.1, torch 1.0", "of different", "new record"))
    assert "python" not in here(*compared, "--resume").stderr  # what is equal is not told
    record.write_text(json.dumps({**content, "schema": "other.results"}))
    refused(*compared, "--resume", says=("other.results",))
    record.write_text(text[: len(text) // 2])
    refused(*compared, "--resume", says=("record",))
    assert record.read_text() == text[: len(text) // 2]  # as it was
