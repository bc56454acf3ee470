"""Documents from a folder: both forms of a row come to the hub's, and what is neither is named."""

import bz2
import json
from pathlib import Path

import pytest

from mxtorq.errors import UsageError
from mxtorq.evaluation.documents import read_task, require_no_examples, write_task_file
from mxtorq.evaluation.tasks import Asked
from task_documents import DOCUMENTS, query_and_gold


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_hubs_rows_stay_as_they_are(name: str, tmp_path: Path) -> None:
    rows = DOCUMENTS[name]
    write(tmp_path / f"{name}.jsonl", [{**row, "more": 1} for row in rows])
    assert list(read_task(name, tmp_path).rows) == rows


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "winogrande"])
def test_the_other_form_becomes_the_hubs(name: str, tmp_path: Path) -> None:
    write(tmp_path / f"{name}.jsonl", [query_and_gold(name, row) for row in DOCUMENTS[name]])
    read = [dict(row) for row in read_task(name, tmp_path).rows]
    expected = [dict(row) for row in DOCUMENTS[name]]
    if name == "hellaswag":  # "Baking: bread: ...": only the whole is known, and only it counts
        for row in (*read, *expected):
            row["ctx_a"] = f"{row.pop('activity_label')}: {row['ctx_a']}"
    assert read == expected


def test_winogrande_gives_the_same_two_sentences(tmp_path: Path) -> None:
    """ "Anna" and "Anne" begin alike, so the options are cut elsewhere."""
    rows = DOCUMENTS["winogrande"]
    write(tmp_path / "winogrande.jsonl", [query_and_gold("winogrande", row) for row in rows])
    for before, now in zip(rows, read_task("winogrande", tmp_path).rows, strict=True):
        assert before["answer"] == now["answer"]
        for option in ("option1", "option2"):
            sentences = [row["sentence"].replace("_", row[option], 1) for row in (before, now)]
            assert sentences[0] == sentences[1]


def test_hellaswag_as_a_text(tmp_path: Path) -> None:
    rows = [query_and_gold("hellaswag", row) for row in DOCUMENTS["hellaswag"]]
    lines = [[row["query"], str(row["gold"]), *row["choices"]] for row in rows]
    text = "\n".join(line for each in lines for line in each)
    write(tmp_path / "hellaswag.jsonl", rows)
    expected = read_task("hellaswag", tmp_path).rows
    (tmp_path / "hellaswag.jsonl").unlink()
    (tmp_path / "hellaswag_val_full.txt").write_text(text + "\n")
    assert read_task("hellaswag", tmp_path).rows == expected
    (tmp_path / "hellaswag_val_full.txt").unlink()
    packed = tmp_path / "hellaswag_val_full.txt.bz2"
    packed.write_bytes(bz2.compress(text.encode()))
    assert read_task("hellaswag", tmp_path).rows == expected
    for damaged, found in (
        (bz2.compress(text.encode())[:-9], "cut short"),
        (b"no bzip2", "OSError"),
        (bz2.compress(text.partition("\n")[2].encode()), "answer 'wipes the door.'"),
        (bz2.compress(text.rpartition("\n")[0].encode()), "four endings"),
        (bz2.compress(b"\xff"), "UnicodeDecodeError"),
    ):
        packed.write_bytes(damaged)
        with pytest.raises(UsageError, match=found):
            read_task("hellaswag", tmp_path)


QUESTION = {"query": "Question: a", "choices": ["b", "c"], "gold": 1}


@pytest.mark.parametrize(
    ("name", "row", "found"),
    [
        ("arc_easy", {"query": "a", "choices": ["b"]}, "without gold"),
        ("arc_easy", {**QUESTION, "gold": 2}, "choice 2 of 2"),
        ("arc_easy", {**QUESTION, "gold": -1}, "choice -1 of 2"),
        ("arc_easy", {**QUESTION, "gold": True}, "gold = True"),
        ("piqa", {**QUESTION, "choices": ["b", "c", "d"]}, "3 choices"),
        ("boolq", QUESTION, "no and yes"),
        ("hellaswag", QUESTION, "four endings"),
        ("lambada_openai", {"context": 1, "continuation": "a"}, "context = 1"),
        ("winogrande", {"context_options": ["a_b", "a_c"], "continuation": "d", "gold": 0}, "a_b"),
        ("winogrande", {"context_options": [], "continuation": "d", "gold": 0}, "choice 0 of 0"),
        ("lambada_openai", {"text": None}, "text = None"),
    ],
)
def test_rows_of_something_else(
    name: str, row: dict[str, object], found: str, tmp_path: Path
) -> None:
    rows = [query_and_gold(name, DOCUMENTS[name][0]), row]
    write(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(UsageError) as caught:
        read_task(name, tmp_path)
    assert found in caught.value.found
    assert "line 2" in caught.value.found


def test_what_a_folder_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "boolq.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"openbookqa\.jsonl or openbook_qa\.jsonl") as caught:
        read_task("openbookqa", tmp_path)
    assert "boolq.jsonl" in caught.value.found
    with pytest.raises(UsageError, match="no document"):
        read_task("boolq", tmp_path)
    with pytest.raises(UsageError, match="no folder"):
        read_task("piqa", tmp_path / "nowhere")
    for wrong, right in (("../piqa", "piqa"), ("helaswag", "hellaswag"), ("acc77", "acc7")):
        with pytest.raises(UsageError, match="none is shipped") as caught:
            read_task(wrong, tmp_path)
        assert f"did you mean {right}" in caught.value.todo
    with pytest.raises(UsageError, match="give away"):
        require_no_examples(Asked(name="piqa", shots=1), tmp_path)
    require_no_examples(Asked(name="piqa", shots=0), tmp_path)


def test_mmlu_and_acc4_without_their_files(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text("")
    for name, file in (
        ("mmlu", "stand in mmlu.jsonl"),
        ("mmlu_cot_llama", "mmlu_cot_llama.jsonl or mmlu.jsonl"),
        ("gsm8k_llama", "gsm8k_llama.jsonl or gsm8k.jsonl"),
    ):
        with pytest.raises(UsageError, match=file) as caught:
            read_task(name, tmp_path)
        assert "piqa.jsonl" in caught.value.found


MMLU = {"question": "a", "subject": "virology", "choices": ["b", "c", "d", "e"], "answer": 3}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"answer": 4}, "choice 4 of 4"),
        ({"choices": ["b"]}, "of 1, not of 4"),
        ({"subject": "../virology"}, "'../virology'"),
        ({"subject": None}, "subject = None"),
        ({"answer": "D"}, "answer = 'D'"),
    ],
)
def test_rows_that_are_not_mmlu_s(change: dict[str, object], found: str, tmp_path: Path) -> None:
    write(tmp_path / "mmlu.jsonl", [MMLU, {**MMLU, **change}])
    with pytest.raises(UsageError) as caught:
        read_task("mmlu", tmp_path)
    assert found in caught.value.found
    assert "line 2" in caught.value.found
    write(tmp_path / "mmlu.jsonl", [{"query": "a", "choices": ["b"], "gold": 0}])
    with pytest.raises(UsageError, match="without question"):
        read_task("mmlu", tmp_path)


def test_a_subject_that_the_harness_does_not_have(tmp_path: Path) -> None:
    own = tmp_path / "harness" / "mmlu" / "default"
    own.mkdir(parents=True)
    (own / "mmlu_virology.yaml").write_text("")
    write(tmp_path / "mmlu.jsonl", [{**MMLU, "subject": "virologie"}])
    task = read_task("mmlu", tmp_path)
    with pytest.raises(UsageError, match="did you mean 'virology'"):
        write_task_file(task, tmp_path, tmp_path / "harness")


def test_paths_with_odd_characters(tmp_path: Path) -> None:
    """They go into YAML."""
    import yaml

    folder = tmp_path / 'a "b": #c $d \\'
    folder.mkdir()
    write(folder / "piqa.jsonl", DOCUMENTS["piqa"])
    task = read_task("piqa", folder)
    scratch = folder / "scratch"
    scratch.mkdir()
    write_task_file(task, scratch, folder / "harness")
    config = yaml.safe_load((scratch / "piqa.yaml").read_text())
    assert config["include"] == str(folder / "harness" / "piqa/piqa.yaml")
    assert config["dataset_kwargs"]["data_files"] == {"validation": str(scratch / "piqa.jsonl")}
