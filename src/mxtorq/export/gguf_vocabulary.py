"""A Hugging Face tokenizer.json as the vocabulary of a GGUF file.

llama.cpp computes tokenizers of its own, chosen by name, and two of them cover the families here:

    gpt2     bytes as letters, merges by rank, text cut by a regular expression first. The file
             names that expression (``tokenizer.ggml.pre``), and llama.cpp knows it by that name.
    llama    SentencePiece's: no cutting, a space is U+2581, unknown bytes are <0x41>; merges by the
             score of what they make.

The name of the expression is found by comparing the tokenizer's own with those that llama.cpp's
source states for its names. Another expression is refused: the file would cut text elsewhere, and
nothing would say so. Scores of ``llama`` are the ranks of the first merges that make a token,
negated, which merges in the same order as long as a token's merges stand together.

Not carried over: normalizers (Qwen's NFC), which llama.cpp does not have.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from mxtorq.errors import UsageError
from mxtorq.reading.documents import Refusal, conforms, parse_object, read_text

TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_LONGEST = 256 * 2**20

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
EXPRESSIONS = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
    f"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""The expressions that Llama 3, Qwen and Mistral Nemo cut text by, and llama.cpp's names."""


class Kind(IntEnum):
    """GGUF's kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: dict[str, int] = field(default_factory=dict)
    """``bos``, ``eos``, ``unk``, ``pad``."""
    adds: dict[str, bool] = field(default_factory=dict)
    """Whether ``bos``, ``eos`` are added, and a leading ``space``."""
    chat_template: str | None = None


def read_vocabulary(folder: Path, config: Mapping[str, Any], size: int) -> Vocabulary:
    """The tokenizer of a model's folder.

    Args:
        folder: holds tokenizer.json.
        config: of the model, for special tokens that the tokenizer does not name.
        size: rows of the embedding; the list of tokens is filled up to it.

    Raises:
        UsageError: llama.cpp has no such tokenizer, or it is damaged.
    """
    refuse = Refusal(
        kind=UsageError,
        asked=f"the tokenizer of {folder} in a GGUF file",
        why="llama.cpp runs tokenizers of its own and would give other tokens",
        todo="pass --without-tokenizer: the file then takes and gives token ids, which you make "
        "with the model's own tokenizer",
    )
    content = parse_object(read_text(folder / TOKENIZER, _LONGEST, refuse), refuse)
    settings: dict[str, Any] = {}
    if (folder / _SETTINGS).is_file():
        settings = parse_object(read_text(folder / _SETTINGS, _LONGEST, refuse), refuse)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise refuse(f"a model {str(model)[:100]}", "only byte pair encodings are known here")
    ids: Any = model.get("vocab")
    merges = model.get("merges") or []
    if not conforms(ids, dict[str, int]) or not isinstance(merges, list):
        raise refuse("a vocabulary that is no table of ids")
    pairs = [each.split(" ", 1) if isinstance(each, str) else each for each in merges]
    if any(not conforms(pair, list[str]) or len(pair) != 2 for pair in pairs):
        raise refuse("merges that are no pairs of tokens")
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise refuse(f"added_tokens = {added!r:.200}")
    tokens, kinds = _tokens(ids, added, size, refuse)
    first, last = _added(content.get("post_processor"))
    shared: dict[str, Any] = {
        "tokens": tokens,
        "special": _special(settings, config, tokens),
        "chat_template": _template(folder, settings, refuse),
    }
    if model.get("byte_fallback"):
        _require_sentencepiece(content, refuse)
        kinds = [_byte_kind(token, kind) for token, kind in zip(tokens, kinds, strict=True)]
        return Vocabulary(
            **shared,
            model="llama",
            pre="default",
            kinds=kinds,
            scores=_scores(tokens, kinds, pairs, refuse),
            adds={"bos": first, "eos": last, "space": _prepends(content)},
        )
    return Vocabulary(
        **shared,
        model="gpt2",
        pre=_expression(content.get("pre_tokenizer"), refuse),
        kinds=kinds,
        merges=[" ".join(pair) for pair in pairs],
        adds={"bos": first, "eos": last},
    )


def _tokens(
    ids: Mapping[str, int], added: list[Any], size: int, refuse: Refusal
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [int(Kind.UNUSED)] * size
    for token, index in ids.items():
        if not 0 <= index < size:
            raise refuse(f"the token {token!r:.100} = {index} and {size} rows of the embedding")
        tokens[index], kinds[index] = token, int(Kind.NORMAL)
    for entry in added:
        named = isinstance(entry, dict) and conforms(entry.get("id"), int)
        if not named or not isinstance(entry.get("content"), str) or not 0 <= entry["id"] < size:
            raise refuse(f"an added token {entry!r:.200} and {size} rows of the embedding")
        special = entry.get("special")
        tokens[entry["id"]] = entry["content"]
        kinds[entry["id"]] = int(Kind.CONTROL if special else Kind.USER_DEFINED)
    return tokens, kinds


def _expression(pre: Any, refuse: Refusal) -> str:
    """llama.cpp's name of how text is cut before merging."""
    steps = [step for step in _steps(pre, "pretokenizers") if isinstance(step, dict)]
    kinds = [step.get("type") for step in steps]
    bytes_ = [step for step in steps if step.get("type") == "ByteLevel"]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        if not steps[0].get("add_prefix_space"):
            return "gpt-2"
    elif kinds == ["Split", "ByteLevel"] and not bytes_[0].get("use_regex", True):
        pattern = steps[0].get("pattern")
        text = pattern.get("Regex") if isinstance(pattern, dict) else None
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        if plain and str(text) in EXPRESSIONS and not bytes_[0].get("add_prefix_space"):
            return EXPRESSIONS[str(text)]
    raise refuse(
        f"a tokenizer that cuts text by {pre!r:.300}",
        f"llama.cpp has it under none of the names {', '.join(EXPRESSIONS.values())} and gpt-2; "
        "under another one text would become other tokens",
    )


def _require_sentencepiece(content: Mapping[str, Any], refuse: Refusal) -> None:
    replaces = [
        step
        for step in (
            *_steps(content.get("normalizer"), "normalizers"),
            content.get("pre_tokenizer"),
        )
        if isinstance(step, dict) and step.get("type") in ("Replace", "Metaspace")
    ]
    if not replaces:
        raise refuse(
            "bytes for unknown letters, and spaces that stay spaces",
            "llama.cpp has that only in SentencePiece's way, where a space is U+2581",
        )


def _scores(
    tokens: list[str], kinds: list[int], pairs: list[list[str]], refuse: Refusal
) -> list[float]:
    ranks: dict[str, int] = {}
    last = ""
    for left, right in pairs:
        made = left + right
        if made in ranks and made != last:
            raise refuse(
                f"the merges of {made!r:.100} not one behind the other",
                "llama.cpp merges by one score a token, not by one a pair",
            )
        ranks.setdefault(made, len(ranks))
        last = made
    unmerged = -float(len(ranks) + 1)
    return [
        -float(ranks.get(token, -unmerged)) if kind == Kind.NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _byte_kind(token: str, kind: int) -> int:
    byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    if byte and kind == Kind.NORMAL:
        return int(Kind.BYTE)
    return int(Kind.UNKNOWN) if token == "<unk>" else kind


def _steps(value: Any, name: str) -> list[Any]:
    """The steps of a Sequence, or the one step that there is."""
    if not isinstance(value, dict):
        return []
    steps = value.get(name)
    return steps if isinstance(steps, list) else [value]


def _prepends(content: Mapping[str, Any]) -> bool:
    steps = [*_steps(content.get("normalizer"), "normalizers"), content.get("pre_tokenizer")]
    return any(
        isinstance(step, dict)
        and (
            step.get("type") == "Prepend"
            or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        )
        for step in steps
    )


def _added(post: Any) -> tuple[bool, bool]:
    """Whether a special token comes before a text, and behind it."""
    for step in _steps(post, "processors"):
        single = step.get("single") if isinstance(step, dict) else None
        if isinstance(single, list) and single:
            first, last = (
                isinstance(s, dict) and "SpecialToken" in s for s in (single[0], single[-1])
            )
            return first, last
    return False, False


def _special(
    settings: Mapping[str, Any], config: Mapping[str, Any], tokens: list[str]
) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number: Any = config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(token, str) and token in tokens:
            found[name] = tokens.index(token)
        elif conforms(number, int) and 0 <= number < len(tokens):
            found[name] = int(number)
    return found


def _template(folder: Path, settings: Mapping[str, Any], refuse: Refusal) -> str | None:
    if (folder / _TEMPLATE).is_file():
        return read_text(folder / _TEMPLATE, _LONGEST, refuse)
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None
