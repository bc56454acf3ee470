"""Text as token windows: where it came from, how documents are joined, what its hash is.

A text is named on the command line as FILE or NAME:

    FILE              plain text (one document), or .jsonl with one {"text": ...} a line
    stdlib            the standard library of the running Python: disjoint parts for calibration
                      and evaluation, no network
    wikitext2         WikiText-2 raw from the hub (needs the ``hub`` extra): the train split for
                      calibration, the test split for evaluation
    wikitext2:FILE    the same from a local wiki.train.raw or wiki.test.raw
    c4                C4, English, from the hub: documents of the first shard of the train split for
                      calibration, of the validation split for evaluation

Documents are opened by BOS where the tokenizer has one and encoded without further special tokens.
WikiText-2 is one document: the rows of the raw split joined by blank lines ("\\n\\n"), which is the
protocol behind the published perplexities.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from mxtorq.embedded import stdlib_text
from mxtorq.errors import TextError
from mxtorq.reading.documents import Refusal, parse_json

Role = Literal["calibration", "evaluation"]

_ENCODED_AT_ONCE = 256
"""Documents a call: the tokenizer's own bookkeeping takes a hundred times their size."""

_C4_DOCUMENTS = 16_384
"""About 8 million tokens; the whole shard would take minutes to tokenize."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents and where they came from."""

    source: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the documents in UTF-8, a NUL between two."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Non-overlapping token windows [windows, seqlen] of one text, and their provenance."""

    ids: Int64[Tensor, "windows seqlen"]
    source: str
    text_sha256: str
    seed: int | None
    """Of the draw; None where the windows are the text's first ones."""

    def record(self) -> dict[str, Any]:
        """What a manifest or a result says of them."""
        raw = self.ids.to(torch.int64).contiguous().numpy().tobytes()
        return {
            "source": self.source,
            "text_sha256": self.text_sha256,
            "tokens": self.ids.numel(),
            "seqlen": self.ids.shape[1],
            "seed": self.seed,
            "tokens_sha256": hashlib.sha256(raw).hexdigest(),
        }


def load_text(name: str, role: Role) -> Text:
    """Read the text called ``name`` for a role; named texts have a part for each.

    Raises:
        TextError: there is no such file or name, or it holds no text.
    """
    kind, _, rest = name.partition(":")
    if kind in NAMED_TEXTS and not Path(name).exists():
        documents = NAMED_TEXTS[kind](role, rest)
    else:
        documents = _read_file(Path(name))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise TextError(
            asked=f"{role} text from {name!r}",
            found="no characters other than white space",
            why="there is nothing to read",
            todo="pass a text that is not empty",
        )
    return Text(source=name, documents=tuple(documents))


def tokenize(text: Text, tokenizer: Any) -> Int64[Tensor, " tokens"]:
    """All documents as one row of token ids, each opened by BOS where the tokenizer has one."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    parts: list[Tensor] = []
    for start in range(0, len(text.documents), _ENCODED_AT_ONCE):
        some = list(text.documents[start : start + _ENCODED_AT_ONCE])
        for ids in tokenizer(some, **options)["input_ids"]:
            parts.append(torch.tensor([*bos, *ids], dtype=torch.int64))
    return torch.cat(parts)


def evaluation_windows(text: Text, tokenizer: Any, *, seqlen: int, tokens: int | None) -> Windows:
    """The text's first windows: all whole ones, or as many as fit into ``tokens``.

    Raises:
        TextError: the text, or ``tokens``, is shorter than a window, or the text is shorter than
            ``tokens``.
    """
    grid = _grid(text, tokenizer, seqlen, tokens, "evaluation")
    chosen = grid if tokens is None else grid[: tokens // seqlen]
    return Windows(ids=chosen, source=text.source, text_sha256=text.sha256, seed=None)


def calibration_windows(
    text: Text, tokenizer: Any, *, seqlen: int, tokens: int, seed: int
) -> Windows:
    """``tokens // seqlen`` of the text's windows, drawn without replacement, in the text's order.

    Raises:
        TextError: as `evaluation_windows`.
    """
    grid = _grid(text, tokenizer, seqlen, tokens, "calibration")
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(grid), generator=draw)[: tokens // seqlen].sort().values
    return Windows(ids=grid[chosen], source=text.source, text_sha256=text.sha256, seed=seed)


def _grid(
    text: Text, tokenizer: Any, seqlen: int, tokens: int | None, role: Role
) -> Int64[Tensor, "windows seqlen"]:
    ids = tokenize(text, tokenizer)
    wanted = seqlen if tokens is None else tokens
    if wanted < seqlen or len(ids) // seqlen < max(1, wanted // seqlen):
        raise TextError(
            asked=f"{wanted} {role} tokens in windows of {seqlen} from {text.source!r}",
            found=f"{len(ids)} tokens, {len(ids) // seqlen} whole windows",
            why="windows do not overlap and none is used twice or cut short",
            todo="pass a longer text, fewer tokens (not below one window) or a smaller --seqlen",
        )
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)


def _read_file(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, or a NUL in the name
        raise TextError(
            asked=f"text from {str(path)!r}",
            found=f"{type(error).__name__}: {error}",
            why="it is neither a readable UTF-8 file nor a text that mxtorq knows by name",
            todo=f"name a file, or one of: {', '.join(NAMED_TEXTS)}",
        ) from error
    if path.suffix != ".jsonl":
        return [content]
    return [
        _jsonl_text(path, number, line)
        for number, line in enumerate(content.split("\n"), 1)  # U+2028 may stand in a string
        if line.strip()
    ]


def _jsonl_text(path: Path, number: int, line: str) -> str:
    refuse = Refusal(
        kind=TextError,
        asked=f"text from {str(path)!r}, line {number}: {line[:60]!r}",
        why='a .jsonl file has one JSON object a line, with a string under "text"',
        todo="correct that line, or rename the file if it is plain text",
    )
    row = parse_json(line, refuse)
    if not (isinstance(row, dict) and isinstance(row.get("text"), str)):
        raise refuse(f"{row!r:.100}")
    return str(row["text"])


def wikitext2_document(rows: list[str]) -> str:
    """The rows of a WikiText-2 raw split as the one document that perplexity is defined on."""
    return "\n\n".join(rows)


def wikitext2_rows(raw: str) -> list[str]:
    """The data set's rows from its raw file: a line keeps its newline, a blank one is empty."""
    lines = raw.removesuffix("\n").split("\n")
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _wikitext2(role: Role, path: str) -> list[str]:
    if path:
        return [wikitext2_document(wikitext2_rows(_read_file(Path(path))[0]))]
    split = {"calibration": "train", "evaluation": "test"}[role]
    rows = _from_hub("Salesforce/wikitext", split, name="wikitext-2-raw-v1")
    return [wikitext2_document(rows)]


def _c4(role: Role, rest: str) -> list[str]:
    split, shards = {"calibration": ("train", 1024), "evaluation": ("validation", 8)}[role]
    file = f"en/c4-{split}.00000-of-{shards:05}.json.gz"
    return _from_hub("allenai/c4", split, data_files={split: file}, most=_C4_DOCUMENTS)


def _from_hub(dataset: str, split: str, most: int | None = None, **options: Any) -> list[str]:
    """The ``text`` column of a data set, or its first ``most`` rows."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,import-untyped,unused-ignore]

        rows = load_dataset(dataset, split=split, streaming=most is not None, **options)
        return [row["text"] for row in islice(rows, most)]
    except Exception as error:  # the hub client has no common root for its errors
        raise TextError(
            asked=f"{dataset} from the hub",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            why="the data set is downloaded by the `datasets` package",
            todo="pip install 'mxtorq[hub]' and connect, or name a local file (wikitext2:FILE for "
            "wiki.test.raw)",
        ) from error


def _stdlib(role: Role, rest: str) -> list[str]:
    return stdlib_text.documents(role)


NAMED_TEXTS: dict[str, Callable[[Role, str], list[str]]] = {
    "stdlib": _stdlib,
    "wikitext2": _wikitext2,
    "c4": _c4,
}
"""Texts that are known by name; the second argument is what follows the colon."""
