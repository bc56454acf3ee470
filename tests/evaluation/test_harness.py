"""Accuracies are those of the harness run directly on the plain Hugging Face model.

The direct runs know nothing of our task files: the harness' own definitions, with their data set
replaced by a folder in the hub's layout.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: the extra `tasks`")

import lm_eval
import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.tasks import TaskManager

import tiny_models
from mxtorq.errors import ModelError, UsageError
from mxtorq.evaluation.harness import ON_A_CPU, score_tasks
from mxtorq.evaluation.questions import opened, require_tokens
from mxtorq.evaluation.tasks import KNOWN, TaskPlan, averages, parse_tasks
from mxtorq.loading.source import Source, load_source
from task_documents import DOCUMENTS, query_and_gold

Result = dict[str, Any]

HARNESS = Path(lm_eval.tasks.__file__).parent
SPLITS = {"arc_challenge": "test", "arc_easy": "test", "lambada_openai": "test"}
SPLITS["openbookqa"] = "test"
EVERY = ",".join(DOCUMENTS)


@pytest.fixture(autouse=True)
def no_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`simple_evaluate` lists the machine's packages in its record, for six seconds a call."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda record: None)


@pytest.fixture(scope="module")
def reference() -> Source:
    return load_source("reference", torch.device("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The documents in both forms, a file a task."""
    root = tmp_path_factory.mktemp("documents")
    forms: dict[str, Callable[[str, Result], Result]] = {
        "hub": lambda name, row: row,
        "other": query_and_gold,
    }
    for form, convert in forms.items():
        (root / form).mkdir()
        for name, rows in DOCUMENTS.items():
            lines = [json.dumps(convert(name, row)) + "\n" for row in rows]
            (root / form / f"{name}.jsonl").write_text("".join(lines))
    return {form: root / form for form in forms}


def score(
    source: Source,
    plan: TaskPlan,
    done: dict[str, Result] | None = None,
    progress: Callable[[str, int, int], None] = lambda *at: None,
) -> dict[str, Result]:
    """New results alone."""
    found: dict[str, Result] = {}
    with opened(plan, done or {}, progress) as questions:
        score_tasks(source.model, source.tokenizer, questions, found.__setitem__, progress)
    return found


def directly(model: Any, names: list[str], rows: dict[str, list[Result]], tmp: Path) -> Result:
    """What the harness finds, each task by itself as we ask them."""
    results: Result = {}
    for name in names:
        folder = tmp / name
        folder.mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").write_text(lines)
        manager = TaskManager(include_defaults=False, include_path=HARNESS / KNOWN[name].folder)
        replaced = {"dataset_path": str(folder), "dataset_name": None}
        replaced["dataset_kwargs"] = {"cache_dir": str(tmp / "cache")}
        group = {"group": "direct", "task": [{"task": name, **replaced}]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the harness' own affair
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=[group],
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        results[name] = found["results"][name]
    return results


def plain(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HFLM(str(folder), dtype="float32", device="cpu", batch_size=ON_A_CPU)


def test_the_harness_says_the_same_of_the_plain_model(
    reference: Source, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Equal, not close: the same operations on the same numbers."""
    ours = score(reference, TaskPlan(tasks=parse_tasks(EVERY), files=folders["hub"]))
    folder = Path(str(files("mxtorq.embedded") / "model"))
    theirs = directly(plain(folder), list(DOCUMENTS), DOCUMENTS, tmp_path)
    assert list(ours) == list(DOCUMENTS)
    for name, result in ours.items():
        for metric, value in result["metrics"].items():
            assert value == theirs[name][f"{metric},none"], (name, metric)
        assert result["value"] == result["metrics"][KNOWN[name].metric]
        assert result["documents"] == len(DOCUMENTS[name])
        assert result["shots"] == 0
        share, count = result["value"], result["documents"]
        assert result["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))
    values = {name: result["value"] for name, result in ours.items()}
    assert len({*values.values()}) > 2  # not all right, nor all wrong
    assert averages(values).keys() == {"acc7", "acc5"}


def test_the_other_form_gives_the_same_prompts(reference: Source, folders: dict[str, Path]) -> None:
    plans = [TaskPlan(tasks=parse_tasks(EVERY), files=folder) for folder in folders.values()]
    hub, other = (score(reference, plan) for plan in plans)
    for name in DOCUMENTS:
        assert hub[name].pop("documents_sha256") != other[name].pop("documents_sha256")
        assert hub[name] == other[name]


def test_finished_tasks_are_not_asked_again(reference: Source, folders: dict[str, Path]) -> None:
    heard: list[tuple[str, int, int]] = []
    plan = TaskPlan(tasks=parse_tasks("piqa,boolq"), files=folders["hub"], limit=2)

    def tell(*at: Any) -> None:
        heard.append(at)

    first = score(reference, plan, progress=tell)
    assert [result["documents"] for result in first.values()] == [2, 2]
    # Each answer is counted, of two choices a document.
    for name in ("piqa", "boolq"):
        assert [at for at in heard if at[0] == name] == [
            (name, 0, 1),
            *((name, done, 4) for done in range(5)),
        ]
    heard.clear()
    again = score(reference, plan, done={"piqa": first["piqa"]}, progress=tell)
    assert again == {"boolq": first["boolq"]}
    assert {stage for stage, *_ in heard} == {"documents", "boolq"}
    assert score(reference, plan, done=first) == {}
    with pytest.raises(UsageError, match="has changed since"):
        score(reference, plan, done={"piqa": {**first["piqa"], "documents_sha256": "0"}})


def test_the_harness_keeps_quiet(
    reference: Source, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    import logging

    import datasets
    import lm_eval.api.task as module

    before = (module.tqdm, logging.getLogger("lm_eval").level)
    score(reference, TaskPlan(tasks=parse_tasks("piqa"), files=folders["hub"]))
    assert capfd.readouterr() == ("", "")
    assert (module.tqdm, logging.getLogger("lm_eval").level) == before
    assert not datasets.are_progress_bars_disabled()


def tiny(folder: Path) -> Source:
    return load_source(str(folder), torch.device("cpu"))


def test_what_does_not_fit_is_counted_or_refused(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """A model of 128 positions and a token a character."""
    source = tiny(tiny_folders["llama"])
    assert source.longest_window() == 128
    rows = [{"goal": "a" * length, "sol1": "b", "sol2": "c" * 4, "label": 0} for length in (5, 200)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = TaskPlan(tasks=parse_tasks("piqa"), files=tmp_path)
    assert score(source, plan)["piqa"]["truncated"] == 2  # two choices of one document
    rows[0]["sol2"] = "c" * 128
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ModelError, match="128 positions"):
        score(source, plan)


def test_a_tokenizer_without_what_prompts_need() -> None:
    tokenizer = tiny_models.tokenizer()
    require_tokens(tokenizer, parse_tasks(EVERY))
    with pytest.raises(ModelError, match="without a chat template"):
        require_tokens(tokenizer, parse_tasks("acc4"))
    tokenizer.bos_token = None
    require_tokens(tokenizer, parse_tasks(EVERY))  # EOS will do, as for Qwen
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a BOS nor an EOS"):
        require_tokens(tokenizer, parse_tasks("piqa"))


def test_documents_of_the_hub_with_examples_in_front(
    reference: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples are drawn as the harness draws them, from the training split."""
    import datasets

    rows = datasets.Dataset.from_list(DOCUMENTS["piqa"])
    splits = datasets.DatasetDict(train=rows.select([2, 1, 0, 3]), validation=rows)
    asked_for: list[Any] = []

    def hub(path: str, name: str | None = None, **options: Any) -> Any:
        asked_for.append((path, name, options))
        return splits

    monkeypatch.setattr(datasets, "load_dataset", hub)
    found = score(reference, TaskPlan(tasks=parse_tasks("piqa:shots=2,piqa")))
    assert {label: result["shots"] for label, result in found.items()} == {
        "piqa:shots=2": 2,
        "piqa": 0,
    }
    assert asked_for == 2 * [("baber/piqa", None, {})]  # nothing of trusting code
    manager = TaskManager(include_defaults=False, include_path=HARNESS / "piqa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lm_eval.simple_evaluate(
            model=plain(Path(str(files("mxtorq.embedded") / "model"))),
            tasks=["piqa"],
            num_fewshot=2,
            task_manager=manager,
            log_samples=True,
        )
    assert theirs is not None
    samples = theirs["samples"]["piqa"]
    prompts = [arguments for sample in samples for arguments in sample["arguments"]]
    digest = hashlib.sha256("".join(json.dumps(each) for each in prompts).encode()).hexdigest()
    assert found["piqa:shots=2"]["prompts_sha256"] == digest
    assert found["piqa"]["prompts_sha256"] != digest
    for metric in ("acc", "acc_norm"):
        assert (
            found["piqa:shots=2"]["metrics"][metric] == theirs["results"]["piqa"][f"{metric},none"]
        )


def test_a_group_is_asked_as_a_whole(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMLU has 57 parts, weighted by their sizes."""
    import datasets

    parts: dict[str, Any] = {}

    def hub(path: str, name: str, **options: Any) -> Any:
        assert path == "cais/mmlu"
        rows = [
            {"question": "a", "choices": ["b", "c", "d", "e"], "answer": (len(parts) + each) % 4}
            for each in range(1 + len(parts) % 2)
        ]
        split = datasets.Dataset.from_list(rows)
        parts[name] = datasets.DatasetDict(dev=split, test=split)
        return parts[name]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    result = score(tiny(tiny_folders["llama"]), TaskPlan(tasks=parse_tasks("mmlu")))["mmlu"]
    assert len(parts) == 57
    assert result["documents"] == 29 + 2 * 28
    assert result["metric"] == "acc"
    right = result["value"] * result["documents"]
    assert right == pytest.approx(round(right), abs=1e-9)
    assert 0 < right < result["documents"]
    assert result["stderr"] is None  # parts of one document have none
    assert result["shots"] == 0


def test_the_harness_has_what_is_known_here() -> None:
    for name, known in KNOWN.items():
        index = TaskManager(include_defaults=False, include_path=HARNESS / known.folder)
        assert name in index.all_subtasks + index.all_groups, name


def test_without_a_network_a_folder_is_named(
    reference: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def offline(*more: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub (offline mode is enabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UsageError) as caught:
        score(reference, TaskPlan(tasks=parse_tasks("piqa")))
    assert "--task-files FOLDER" in caught.value.todo
    assert "offline mode" in caught.value.found


def test_names_that_the_harness_does_not_have(
    reference: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small index in the place of 14,000 tasks, which take half a minute to read."""
    from mxtorq.evaluation import questions

    def small(**options: Any) -> TaskManager:
        return TaskManager(include_defaults=False, include_path=[HARNESS / "arc", HARNESS / "piqa"])

    monkeypatch.setattr(questions, "TaskManager", small)
    for name, hint in (("piqua", "did you mean piqa"), ("acc77", "acc7"), ("ai2_arc", "arc_easy")):
        with pytest.raises(UsageError) as caught:
            score(reference, TaskPlan(tasks=parse_tasks(name)))
        assert hint in caught.value.todo
