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
from mxtorq.evaluation.documents import read_task
from mxtorq.evaluation.harness import ON_A_CPU, Scorer, score_tasks
from mxtorq.evaluation.questions import opened, require_tokens
from mxtorq.evaluation.tasks import KNOWN, TaskPlan, averages, parse_tasks
from mxtorq.loading.source import Source, load_source
from task_documents import DOCUMENTS, query_and_gold

Result = dict[str, Any]

HARNESS = Path(lm_eval.tasks.__file__).parent
SPLITS = {"arc_challenge": "test", "arc_easy": "test", "lambada_openai": "test"}
SPLITS["openbookqa"] = "test"
EVERY = ",".join(DOCUMENTS)
REAL = {"babyllama-tok361": "winogrande", "stories260K": "piqa"}
"""Models that were trained elsewhere, and a task each: to the first, which has a token a letter, an
answer of PIQA is longer than its window."""


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


@pytest.mark.parametrize(("model", "other"), REAL.items())
def test_real_models_and_real_documents(model: str, other: str, data: Path, tmp_path: Path) -> None:
    """The first questions of the real files, some of which lose their beginning."""
    folder, names = data / "models" / model, ["arc_easy", other, "lambada_openai"]
    plan = TaskPlan(tasks=parse_tasks(",".join(names)), files=data / "tasks", limit=25)
    ours = score(load_source(str(folder), torch.device("cpu")), plan)
    rows = {name: list(read_task(name, data / "tasks").rows[:25]) for name in names}
    theirs = directly(plain(folder), names, rows, tmp_path)
    for name, result in ours.items():
        assert result["documents"] == 25
        for metric, value in result["metrics"].items():
            assert value == theirs[name][f"{metric},none"], (name, metric)
    assert len({result["value"] for result in ours.values()}) > 2
    assert (ours["arc_easy"]["truncated"] > 0) is (model == "babyllama-tok361")


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
    said: list[tuple[str, int, int]] = []
    assert score(reference, plan, done=first, progress=lambda *at: said.append(at)) == {}
    assert said == []  # and no bar of nothing
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
    with pytest.raises(ModelError, match="128 positions") as caught:
        score(source, plan)
    assert "piqa" in caught.value.asked


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


def test_writing_ends_at_eos_which_has_to_be_there(tiny_folders: dict[str, Path]) -> None:
    """Of the tasks that are known here, those of acc4 write."""
    source = tiny(tiny_folders["llama"])
    source.tokenizer.eos_token = None
    scorer = Scorer(source.model, source.tokenizer, 1)
    with pytest.raises(ModelError, match="without an EOS"):
        scorer.generate_until([])


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
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MMLU has 57 parts, weighted by their sizes; the same from the hub and from one file."""
    import datasets

    parts: dict[str, list[Result]] = {}
    load = datasets.load_dataset

    def hub(path: str, name: str | None = None, **options: Any) -> Any:
        if path == "json":
            return load(path, name, **options)
        assert path == "cais/mmlu"
        assert name is not None
        parts[name] = [
            {**MMLU, "subject": name, "answer": (len(parts) + each) % 4}
            for each in range(1 + len(parts) % 2)
        ]
        split = datasets.Dataset.from_list(parts[name])
        return datasets.DatasetDict(dev=split, test=split)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    source, asked = tiny(tiny_folders["llama"]), parse_tasks("mmlu")
    result = score(source, TaskPlan(tasks=asked))["mmlu"]
    assert len(parts) == 57
    assert result["documents"] == 29 + 2 * 28
    assert result["metric"] == "acc"
    right = result["value"] * result["documents"]
    assert right == pytest.approx(round(right), abs=1e-9)
    assert 0 < right < result["documents"]
    assert result["stderr"] is None  # parts of one document have none
    assert result["shots"] == 0

    rows = [row for name in reversed(parts) for row in parts[name]]
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = score(source, TaskPlan(tasks=asked, files=tmp_path))["mmlu"]
    assert local.pop("documents_sha256")
    assert local == result


MMLU: Result = {"question": "a", "choices": ["b", "c", "d", "e"]}


def test_some_subjects_of_mmlu_and_what_acc4_writes(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The mean of the group is over documents, not over subjects: three of one and one of another.

    The written tasks have the same file, and are too long for a tiny model.
    """
    source = tiny(tiny_folders["llama"])

    def asked(rows: list[Result], tasks: str) -> dict[str, Result]:
        (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return score(source, TaskPlan(tasks=parse_tasks(tasks), files=tmp_path))

    virology = [{**MMLU, "subject": "virology", "answer": at} for at in (0, 1, 2)]
    anatomy = [{**MMLU, "subject": "anatomy", "answer": at} for at in range(4)]
    alone = asked(virology, "mmlu")["mmlu"]
    right = alone["value"] * 3  # the same question with three answers
    assert right == pytest.approx(round(right))
    answer = next(r for r in anatomy if asked([r], "mmlu")["mmlu"]["value"] == 1.0)
    both = asked([*virology, answer], "mmlu")["mmlu"]
    assert both["documents"] == 4
    assert both["value"] == pytest.approx((right + 1) / 4)  # not (right / 3 + 1) / 2

    gsm8k = {"question": "What is 1 + 1?", "answer": "It is 2. #### 2"}
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(gsm8k) + "\n")
    for name, question in (("mmlu_cot_llama", "a\nA. b"), ("gsm8k_llama", "1 + 1?")):
        plan = TaskPlan(tasks=parse_tasks(name), files=tmp_path)
        with opened(plan, {}, lambda *at: None) as questions:
            tasks = questions.loaded[name]["tasks"]
            texts = [each.doc_to_text(doc) for each in tasks.values() for doc in each.test_docs()]
            targets = [
                each.doc_to_target(doc) for each in tasks.values() for doc in each.test_docs()
            ]
        assert len(texts) == (4 if name == "mmlu_cot_llama" else 1)
        assert all(question in text for text in texts)
        assert set(targets) <= {"A", "B", "C", "D", "2"}
        with pytest.raises(ModelError, match="128 positions") as caught:
            source.tokenizer.chat_template = "{{ messages }}"
            score(source, plan)
        assert name in caught.value.asked


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
