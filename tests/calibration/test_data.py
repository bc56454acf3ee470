"""Texts become windows: joining, drawing, hashing, and every way in which a text can be wrong."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from mxtorq.calibration.data import (
    Text,
    calibration_windows,
    evaluation_windows,
    load_text,
    tokenize,
    wikitext2_document,
    wikitext2_rows,
)
from mxtorq.errors import TextError

TOKENIZER = tiny_models.tokenizer()
BOS = 256


def text(*documents: str) -> Text:
    return Text(source="test", documents=documents)


def test_documents_are_opened_by_bos() -> None:
    ids = tokenize(text("ab", "c"), TOKENIZER)
    assert ids.tolist()[0] == BOS
    assert ids.tolist()[3] == BOS
    assert len(ids) == 5
    assert TOKENIZER.decode(ids[1:3]) == "ab"


def test_without_a_bos_documents_follow_each_other() -> None:
    plain = tiny_models.tokenizer()
    plain.bos_token = None
    assert len(tokenize(text("ab", "c"), plain)) == 3


def test_plain_text_is_one_document_and_jsonl_has_one_a_line(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n\ntwo\n", encoding="utf-8")
    lines.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n', encoding="utf-8")
    assert load_text(str(plain), "calibration").documents == ("one\n\ntwo\n",)
    assert load_text(str(lines), "evaluation").documents == ("one", "two")


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    """Unicode has other line ends, which may stand in a JSON string as they are."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}', encoding="utf-8", newline="")
    assert load_text(str(path), "calibration").documents == ("a\u2028b\x85c", "d")


def test_evaluation_takes_the_first_windows() -> None:
    source = text("x" * 99)
    windows = evaluation_windows(source, TOKENIZER, seqlen=10, tokens=35)
    assert windows.ids.shape == (3, 10)
    assert torch.equal(windows.ids.flatten(), tokenize(source, TOKENIZER)[:30])
    assert evaluation_windows(source, TOKENIZER, seqlen=30, tokens=None).ids.shape == (3, 30)


def test_calibration_draws_by_its_seed_without_replacement() -> None:
    source = text("".join(chr(32 + i % 90) for i in range(4000)))
    draws = [
        calibration_windows(source, TOKENIZER, seqlen=10, tokens=1000, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0].ids, draws[1].ids)
    assert draws[0].record() == draws[1].record()
    assert not torch.equal(draws[0].ids, draws[2].ids)
    everything = calibration_windows(source, TOKENIZER, seqlen=10, tokens=4000, seed=3)
    assert torch.equal(everything.ids.flatten(), tokenize(source, TOKENIZER)[:4000])


def test_the_record_names_source_seed_and_hashes() -> None:
    windows = calibration_windows(text("x" * 99), TOKENIZER, seqlen=10, tokens=50, seed=7)
    record = windows.record()
    assert record["source"] == "test"
    assert record["seed"] == 7
    assert record["tokens"] == 50
    assert record["seqlen"] == 10
    assert len(record["text_sha256"]) == len(record["tokens_sha256"]) == 64
    assert record["text_sha256"] != text("x" * 98).sha256


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "a.txt", "no characters"),
        (" \n\t\n", "a.txt", "no characters"),
        ("", "a.jsonl", "no characters"),
        ('{"text": "fine"}\n{"txt": 1}', "a.jsonl", "line 2"),
        ('{"text": "fine"}\n{"text": 1}', "a.jsonl", "line 2"),
        ("not json", "a.jsonl", "line 1"),
        ("[" * 100_000, "a.jsonl", "RecursionError"),
        (r'{"text": "half a pair: \ud83d"}', "a.jsonl", "surrogates"),
        ('{"text": "a", "text": "b"}', "a.jsonl", "stands there twice"),
    ],
)
def test_empty_and_malformed_files(tmp_path: Path, content: str, name: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(TextError, match=message):
        load_text(str(tmp_path / name), "calibration")


def test_missing_files_and_other_encodings(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="stdlib, wikitext2"):
        load_text(str(tmp_path / "none.txt"), "calibration")
    (tmp_path / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(TextError, match="UnicodeDecodeError"):
        load_text(str(tmp_path / "latin.txt"), "calibration")
    for name in (str(tmp_path), "a\0b", "\ud800", "n" * 5000):
        with pytest.raises(TextError):
            load_text(name, "calibration")


@pytest.mark.parametrize(("seqlen", "tokens"), [(200, 200), (10, 110), (50, 20)])
def test_too_short_texts(seqlen: int, tokens: int) -> None:
    """Longer than the text, more than the text has, less than a window."""
    with pytest.raises(TextError, match="whole windows"):
        evaluation_windows(text("x" * 99), TOKENIZER, seqlen=seqlen, tokens=tokens)
    with pytest.raises(TextError, match="whole windows"):
        calibration_windows(text("x" * 99), TOKENIZER, seqlen=seqlen, tokens=tokens, seed=0)


def test_wikitext2_from_the_hub_says_what_is_missing() -> None:
    with pytest.raises(TextError, match=r"mxtorq\[hub\]"):
        load_text("wikitext2", "evaluation")


@pytest.mark.parametrize(
    ("name", "role", "expected"),
    [
        ("wikitext2", "calibration", ("Salesforce/wikitext", "train", False, None)),
        ("wikitext2", "evaluation", ("Salesforce/wikitext", "test", False, None)),
        ("c4", "calibration", ("allenai/c4", "train", True, "en/c4-train.00000-of-01024.json.gz")),
        (
            "c4",
            "evaluation",
            ("allenai/c4", "validation", True, "en/c4-validation.00000-of-00008.json.gz"),
        ),
    ],
)
def test_each_role_has_its_own_split(
    name: str, role: str, expected: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of the hub; the download itself needs a network."""
    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, split: str, streaming: bool, **options: Any) -> list[Any]:
        files = options.get("data_files")
        asked.append((path, split, streaming, files and files[split]))
        return [{"text": "one"}, {"text": "two"}]

    hub = types.ModuleType("datasets")
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    text = load_text(name, role)
    assert asked == [expected]
    assert text.documents == (("one\n\ntwo",) if name == "wikitext2" else ("one", "two"))


def test_wikitext2_rows_of_the_raw_file() -> None:
    raw = " \n = Title = \n \n Text . \n"
    assert wikitext2_rows(raw) == ["", " = Title = \n", "", " Text . \n"]
    assert wikitext2_document(["", "a\n", ""]) == "\n\na\n\n\n"


def test_wikitext2_is_the_canonical_protocol(data: Path) -> None:
    """The raw file gives the data set's rows, and Qwen's tokenizer its published token count."""
    from transformers import AutoTokenizer

    rows = json.loads((data / "text/wikitext2_raw_test.rows.json").read_text(encoding="utf-8"))
    loaded = load_text(f"wikitext2:{data / 'text/wiki.test.raw'}", "evaluation")
    assert loaded.documents == ("\n\n".join(rows),)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers/qwen3")
    assert len(tokenize(loaded, tokenizer)) == 299_078
