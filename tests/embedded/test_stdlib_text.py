"""The text that every Python carries: disjoint splits, named by documents alone."""

from pathlib import Path

import pytest

from mxtorq.embedded import stdlib_text
from mxtorq.errors import TextError


def test_splits_are_disjoint_and_large_enough() -> None:
    splits = {s: stdlib_text.documents(s) for s in ("train", "calibration", "evaluation")}
    seen: set[str] = set()
    for documents in splits.values():
        assert not seen & set(documents)
        seen |= set(documents)
    size = {split: sum(map(len, documents)) for split, documents in splits.items()}
    assert size["train"] > 3_000_000
    assert min(size["calibration"], size["evaluation"]) > 200_000


def test_the_name_alone_decides() -> None:
    """Frozen: another assignment would mix evaluation text into what the model was trained on."""
    assert stdlib_text.split_of("argparse.py") == "train"
    names = [f"package/module{i}.py" for i in range(10_000)]
    shares = [sum(stdlib_text.split_of(n) == s for n in names) for s in ("train", "calibration")]
    assert abs(shares[0] / 10_000 - 0.88) < 0.02
    assert abs(shares[1] / 10_000 - 0.06) < 0.02


def test_documentation_is_part_of_it() -> None:
    assert any(name.startswith("topic:") for name in stdlib_text._topics())


def test_a_stripped_installation_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdlib_text, "_root", lambda: tmp_path)
    with pytest.raises(TextError, match="without its sources"):
        stdlib_text.documents("evaluation")
