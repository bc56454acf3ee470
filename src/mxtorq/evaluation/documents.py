"""The documents of tasks from a folder of yours, as local task files of the harness.

For machines without a network. For each task that is asked, its documents are read from the folder,
turned into the rows that the hub's data set has, and put beside a task file of ours (`task_files`)
that *includes* the harness' definition and changes its data set alone. So the harness itself makes
the same prompts from the same documents, whichever way they came.

A file is called after its task and has a JSON object on each line, in one of two forms:

    the hub's        the fields of `_HUB`, as ``datasets`` exports them
    query and gold   ``query``, ``choices``, ``gold`` (WinoGrande: ``context_options``,
                     ``continuation``, ``gold``; LAMBADA: ``context``, ``continuation``), as other
                     evaluation suites have it

HellaSwag may also be the text that llama.cpp reads (six lines a document: context, answer, four
endings). That text, and BoolQ in the second form, leave something out that the hub has:

    HellaSwag    where the first half of a context ends. The harness begins the second with a
                 capital; it is taken to begin after the last full stop, which is unclear in about
                 one context of a thousand
    BoolQ        the title in front of a passage ("Ethanol fuel -- ...")

MMLU is 57 tasks and one file: each row has its ``subject``, and a file may hold some of them only.
A task file is made for each, and the harness' own group of them with the members that are there.

Nothing in the folder is run: rows are data, and a task file that may lie there is not read.
"""

import bz2
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import Any

from mxtorq.errors import UsageError
from mxtorq.evaluation.tasks import KNOWN, SUITES, Asked
from mxtorq.reading.documents import Refusal, parse_object, read_bytes, require_keys
from mxtorq.specs import nearest, unknown

_LONGEST = 256 * 2**20
"""Bytes of a file, and of what a compressed one holds: the largest real one has 12 MB."""

_SHIPPED = "mxtorq.evaluation"

Row = dict[str, Any]

_MMLU = {"question": str, "subject": str, "choices": list[str], "answer": int}

_HUB: dict[str, dict[str, Any]] = {
    "arc_challenge": {"question": str, "choices": dict[str, list[str]], "answerKey": str},
    "arc_easy": {"question": str, "choices": dict[str, list[str]], "answerKey": str},
    "boolq": {"passage": str, "question": str, "label": int},
    "gsm8k_llama": {"question": str, "answer": str},
    "hellaswag": {
        **dict.fromkeys(("activity_label", "ctx_a", "ctx_b", "label"), str),
        "endings": list[str],
    },
    "lambada_openai": {"text": str},
    "mmlu": _MMLU,
    "mmlu_cot_llama": _MMLU,
    "openbookqa": {"question_stem": str, "choices": dict[str, list[str]], "answerKey": str},
    "piqa": {**dict.fromkeys(("goal", "sol1", "sol2"), str), "label": int},
    "winogrande": dict.fromkeys(("sentence", "option1", "option2", "answer"), str),
}
"""The fields that the harness' definitions read."""

_ALSO_CALLED = {
    "gsm8k_llama": ("gsm8k.jsonl",),
    "hellaswag": ("hellaswag_val_full.txt", "hellaswag_val_full.txt.bz2"),
    "mmlu_cot_llama": ("mmlu.jsonl",),
    "openbookqa": ("openbook_qa.jsonl",),
}


@dataclass(frozen=True, kw_only=True)
class LocalTask:
    """A task whose documents come from a file."""

    name: str
    path: Path
    sha256: str
    """Of the file, as it lies there."""
    rows: tuple[Row, ...]


def read_task(name: str, folder: Path) -> LocalTask:
    """The documents of a task from a folder.

    Raises:
        UsageError: there is no file of it, or it does not hold documents of that task.
    """
    if name not in _HUB:
        near = nearest(name, [*SUITES, *_HUB])
        hint = f"did you mean {', '.join(near)}? Otherwise " if near else ""
        raise UsageError(
            asked=f"the task {name!r} with --task-files",
            found=f"task files for {', '.join(_HUB)}",
            why="a folder has documents and no definitions, and of this task none is shipped",
            todo=f"{hint}leave --task-files away to take its documents from the hub",
        )
    path = _find(name, folder)
    refuse = Refusal(
        kind=UsageError,
        asked=f"the documents of {name} in {path}",
        why="they are rows with the fields of the hub's data set, or with query, choices and gold",
        todo="correct or replace the file; `docs/results.md` shows a row of each form",
    )
    content = read_bytes(path, _LONGEST, refuse)
    try:
        text = (_unpacked(content, refuse) if path.suffix == ".bz2" else content).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(f"{type(error).__name__}: {error}") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    if path.suffix == ".jsonl":
        rows = tuple(_row(name, line, number, refuse) for number, line in enumerate(lines, 1))
    else:
        rows = tuple(_hellaswag_text(lines, refuse))
    if not rows:
        raise refuse("no document")
    return LocalTask(name=name, path=path, sha256=hashlib.sha256(content).hexdigest(), rows=rows)


def write_task_file(task: LocalTask, folder: Path, harness: Path) -> None:
    """Put a task file of the harness, and the documents that it reads, into an empty folder.

    Args:
        harness: where the harness keeps its own tasks.
    """
    if _HUB[task.name] is not _MMLU:
        _fill(task.name, task.name, task.rows, folder, {"harness": harness})
        return
    import yaml  # a requirement of transformers and of the harness

    own = harness / KNOWN[task.name].folder
    by_subject: dict[str, list[Row]] = {}
    for row in task.rows:
        by_subject.setdefault(row["subject"], []).append(row)
    for subject, rows in by_subject.items():
        definition = own / f"mmlu_{subject}.yaml"
        if not definition.is_file():
            known = sorted(path.stem.removeprefix("mmlu_") for path in own.glob("mmlu_*.yaml"))
            raise unknown(f"subject in {task.path}", subject, known)
        _fill("mmlu", f"{task.name}_{subject}", rows, folder, {"definition": definition})
    group = yaml.safe_load((own / f"_{task.name}.yaml").read_text(encoding="utf-8"))
    group["task"] = [f"{task.name}_{subject}" for subject in sorted(by_subject)]
    (folder / f"{task.name}.yaml").write_text(json.dumps(group), encoding="utf-8")


def _fill(
    shipped: str, name: str, rows: Sequence[Row], folder: Path, paths: Mapping[str, Path]
) -> None:
    """The task file of ours of that name with its paths, and the documents beside it."""
    documents = folder / f"{name}.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    documents.write_text(text, encoding="utf-8")
    every = {**paths, "documents": documents, "cache": folder / "cache"}
    quoted = {key: json.dumps(str(path))[1:-1] for key, path in every.items()}
    template = Template(_shipped(shipped).read_text(encoding="utf-8"))
    (folder / f"{name}.yaml").write_text(template.substitute(quoted), encoding="utf-8")


def _shipped(name: str) -> Traversable:
    return files(_SHIPPED).joinpath(f"task_files/{name}.yaml")


def require_no_examples(asked: Asked, folder: Path) -> None:
    """Raises:
    UsageError: examples are wanted in front of the questions of a folder.
    """
    if asked.shots:
        raise UsageError(
            asked=f"{asked.label} with --task-files {folder}",
            found="a folder of questions alone",
            why="the examples come from a training split; questions as examples would give away "
            "answers",
            todo=f"ask {asked.name} without examples, or leave --task-files away",
        )


def _find(name: str, folder: Path) -> Path:
    names = (f"{name}.jsonl", *_ALSO_CALLED.get(name, ()))
    for each in names:
        if (folder / each).is_file():
            return folder / each
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise UsageError(
        asked=f"the task {name!r} from --task-files {folder}",
        found=f"{', '.join(there[:20]) or 'nothing'} there" if folder.is_dir() else "no folder",
        why=f"its documents stand in {' or '.join(names)}",
        todo="put that file there, or leave the task or --task-files away",
    )


def _unpacked(content: bytes, refuse: Refusal) -> bytes:
    unpack = bz2.BZ2Decompressor()
    try:
        text = unpack.decompress(content, _LONGEST)
    except (OSError, ValueError) as error:
        raise refuse(f"{type(error).__name__}: {error}") from error
    if not unpack.eof:
        raise refuse("a compressed file that is cut short, or of more than 256 MiB")
    return text


def _row(name: str, line: str, number: int, refuse: Refusal) -> Row:
    row, where = parse_object(line, refuse), f"line {number}"
    hub = _HUB[name]
    if not hub.keys() <= row.keys() and name in _CONVERSIONS:
        row = _CONVERSIONS[name](row, refuse, where)
    require_keys(row, hub, refuse, where)
    if hub is _MMLU:
        _require_lettered(row, refuse, where)
    return {field: row[field] for field in hub}


def _require_lettered(row: Row, refuse: Refusal, where: str) -> None:
    """Four choices, which the harness calls A to D, and a subject that may be part of a name."""
    if len(row["choices"]) != 4 or not 0 <= row["answer"] < 4:
        raise refuse(f"{where} with choice {row['answer']} of {len(row['choices'])}, not of 4")
    if re.fullmatch(r"[a-z_]{1,50}", row["subject"]) is None:
        raise refuse(f"{where} with the subject {row['subject']!r:.100}")


def _question(row: Row, refuse: Refusal, where: str) -> tuple[str, list[str], int]:
    """The query, the choices and the index of the right one."""
    require_keys(row, {"query": str, "choices": list[str], "gold": int}, refuse, where)
    gold: int = row["gold"]
    if not 0 <= gold < len(row["choices"]):
        raise refuse(f"{where} with choice {gold} of {len(row['choices'])} as the right one")
    return row["query"], row["choices"], gold


def _lettered(choices: list[str], gold: int) -> Row:
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    return {"choices": {"text": choices, "label": letters}, "answerKey": letters[gold]}


def _arc(row: Row, refuse: Refusal, where: str) -> Row:
    query, choices, gold = _question(row, refuse, where)
    return {"question": query.removeprefix("Question: "), **_lettered(choices, gold)}


def _openbookqa(row: Row, refuse: Refusal, where: str) -> Row:
    query, choices, gold = _question(row, refuse, where)
    return {"question_stem": query, **_lettered(choices, gold)}


def _piqa(row: Row, refuse: Refusal, where: str) -> Row:
    query, choices, gold = _question(row, refuse, where)
    if len(choices) != 2:
        raise refuse(f"{where} with {len(choices)} choices instead of 2")
    goal = query.removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": gold}


def _boolq(row: Row, refuse: Refusal, where: str) -> Row:
    query, choices, gold = _question(row, refuse, where)
    passage, separator, question = query.rpartition("\nQuestion: ")
    if choices != ["no", "yes"] or not separator:
        raise refuse(f"{where} that is no passage, question and choice of no and yes")
    return {
        "passage": passage.removeprefix("Passage: "),
        "question": question.rstrip("\n").removesuffix("?"),
        "label": gold,
    }


def _lambada(row: Row, refuse: Refusal, where: str) -> Row:
    require_keys(row, dict.fromkeys(("context", "continuation"), str), refuse, where)
    return {"text": f"{row['context']} {row['continuation']}"}


def _winogrande(row: Row, refuse: Refusal, where: str) -> Row:
    require_keys(row, {"context_options": list[str], "continuation": str}, refuse, where)
    contexts = row["context_options"]
    _, _, gold = _question({"query": "", "choices": contexts, **row}, refuse, where)
    before = _common_beginning(contexts)
    if len(contexts) != 2 or "_" in before:  # the harness looks for the first "_"
        raise refuse(f"{where} with {len(contexts)} contexts {contexts!r:.200}")
    return {
        "sentence": f"{before}_ {row['continuation']}",
        "option1": contexts[0][len(before) :],
        "option2": contexts[1][len(before) :],
        "answer": str(gold + 1),
    }


def _common_beginning(texts: list[str]) -> str:
    same = [len(set(letters)) == 1 for letters in zip(*texts, strict=False)]
    return texts[0][: [*same, False].index(False)]


def _hellaswag(row: Row, refuse: Refusal, where: str) -> Row:
    query, choices, gold = _question(row, refuse, where)
    label, separator, context = query.partition(": ")
    if len(choices) != 4 or not separator:
        raise refuse(f"{where} that is no 'activity: context' with four endings")
    first, second = _halves(context)
    return {
        "activity_label": label,
        "ctx_a": first,
        "ctx_b": second,
        "endings": choices,
        "label": str(gold),
    }


def _halves(context: str) -> tuple[str, str]:
    """A context and the unfinished sentence at its end, which is empty where there is none."""
    found = re.search(r"[.!?][\"')]? (?=[^.!?]*$)", context)
    if found is None or context.endswith((".", "!", "?")):
        return context, ""
    return context[: found.end() - 1], context[found.end() :]


def _hellaswag_text(lines: list[str], refuse: Refusal) -> Iterator[Row]:
    for start in range(0, len(lines), 6):
        where = f"the document of line {start + 1}"
        query, gold, *choices = [*lines[start : start + 6], ""]
        choices.pop()
        if gold.strip() not in ("0", "1", "2", "3"):
            raise refuse(f"{where} with the answer {gold!r:.100}")
        row = {"query": query, "choices": choices, "gold": int(gold)}
        yield _hellaswag(row, refuse, where)


_CONVERSIONS: dict[str, Callable[[Row, Refusal, str], Row]] = {
    "arc_challenge": _arc,
    "arc_easy": _arc,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "lambada_openai": _lambada,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "winogrande": _winogrande,
}
