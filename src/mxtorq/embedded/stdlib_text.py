"""Text that every Python installation carries: the standard library's sources and documentation.

One idea: a quantization run needs text, and a machine without a network has at least the
interpreter that runs us. A document is one source file of the standard library, or one topic of
the language reference that ``pydoc`` carries.

Three disjoint splits, chosen by a hash of the document's *name*: ``train`` (what the embedded
model has seen), ``calibration`` and ``evaluation``. Because the name decides, a document keeps
its split when another Python version has changed its content, so the evaluation text of one
version is never the training text of another. The price: figures on this text depend on the
Python version a little; its hash therefore stands in every result.

Left out: packages that distributions split off or that later versions dropped (tests, idlelib,
tkinter, lib2to3, distutils), generated tables (encodings) and whatever was installed on top.
"""

import ast
import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

from mxtorq.errors import TextError

Split = Literal["train", "calibration", "evaluation"]

_LEFT_OUT = {
    *("__pycache__", "__phello__", "distutils", "encodings", "ensurepip", "idle_test", "idlelib"),
    *("lib-dynload", "lib2to3", "site-packages", "dist-packages", "test", "tests", "tkinter"),
    "turtledemo",
}
_LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata", "_test")
_SHORTEST = 400
"""Characters below which a document (an empty ``__init__.py``, say) teaches nothing."""


def split_of(name: str) -> Split:
    """The split of the document called ``name``: 88 % train, 6 % calibration, 6 % evaluation."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 88 else "calibration" if bucket < 94 else "evaluation"


def documents(split: Split) -> list[str]:
    """All documents of one split, in the order of their names.

    Raises:
        TextError: this interpreter comes without its sources.
    """
    named = {**_sources(), **_topics()}
    chosen = [named[name] for name in sorted(named) if split_of(name) == split]
    if len(chosen) < 10:
        raise TextError(
            asked=f"the {split} text from the standard library",
            found=f"{len(chosen)} documents under {_root()}",
            why="this Python installation comes without its sources (zipped, frozen or stripped)",
            todo="pass a text file of your own",
        )
    return chosen


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _sources() -> dict[str, str]:
    found: dict[str, str] = {}
    root = _root()
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if _LEFT_OUT.intersection(parts) or parts[0] == "pydoc_data":
            continue
        if any(part.startswith(_LEFT_OUT_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # one unreadable file does not cost the run
            continue
        if len(text) >= _SHORTEST:
            found["/".join(parts)] = text
    return found


def _topics() -> dict[str, str]:
    path = _root() / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "topics":
            topics: dict[str, str] = ast.literal_eval(node.value)
            return {f"topic:{k}": v for k, v in topics.items() if len(v) >= _SHORTEST}
    return {}
