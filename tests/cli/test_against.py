"""``--against``: our rows beside published figures, as the command prints and writes them."""

from pathlib import Path

import pytest

from command import here

FIGURES = """
[models.tiny]
names = ["{model}"]
[protocols.one]
source = "A paper of tiny models"
text = "{text}"
seqlen = 64
[[row]]
model = "tiny"
protocol = "one"
called = "direct"
method = "identity"
rounding = "rtn"
scale_rule = "floor"
perplexity = 2
tolerance = 1e9
[[row]]
model = "tiny"
protocol = "one"
called = "close"
method = "identity"
rounding = "rtn"
scale_rule = "floor"
perplexity = 2
tolerance = 1e-9
[[row]]
model = "tiny"
protocol = "one"
called = "not there"
method = "wush"
scale_rule = "log256"
perplexity = 2
"""


def test_compare_and_report_set_rows_beside_published_ones(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    model, figures = tiny_folders["llama"], tmp_path / "figures.toml"
    figures.write_text(FIGURES.format(model=model.name.upper(), text=story), encoding="utf-8")
    record, table = tmp_path / "record.json", tmp_path / "table.md"
    small = ("--calibration", story, "--calibration-tokens", 128, "--seqlen", 64)
    small = (*small, "--text", story, "--eval-tokens", 128, "--methods", "identity")
    small = (*small, "--scale-rules", "floor,even", "--json", record, "--markdown", table)
    done = here("compare", model, *small, "--against", figures)
    assert done.returncode == 0, done.stderr
    for said in (
        *("Beside published figures (figures.toml)", "yes (±1e+09)", "no (±1e-09)", "other rule"),
        *("published, not run here", "A paper of tiny models"),
    ):
        assert said in done.stdout, said
    text = table.read_text(encoding="utf-8")
    assert "yes (±1e+09)" in text
    assert text.count("| other rule |") == 2  # the row under even, beside each published one

    again = tmp_path / "again.md"
    done = here("report", record, "--against", figures, "--markdown", again)
    assert done.returncode == 0, done.stderr
    assert again.read_text(encoding="utf-8") == text
    done = here("report", record, "--against", figures)
    assert done.returncode == 0, done.stderr
    assert "yes (±1e+09)" in done.stdout
    pytest.importorskip("matplotlib", reason="needs the plotting library: the extra `report`")
    page = tmp_path / "page.html"
    done = here("report", record, "--against", figures, "--report", page)
    assert done.returncode == 0, done.stderr
    drawn = page.read_text(encoding="utf-8")
    assert "Beside published figures" in drawn
    assert "yes (±1e+09)" in drawn


def test_the_file_is_read_before_any_work(tmp_path: Path) -> None:
    """A model that does not exist is not even looked for."""
    for verb in (("compare", tmp_path / "no-model"), ("report", tmp_path / "no-record.json")):
        done = here(*verb, "--against", tmp_path / "none.toml")
        assert done.returncode == 1
        assert "published figures" in done.stderr
        assert "none.toml" in done.stderr


def test_a_record_without_figures_is_refused(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    figures, out = tmp_path / "figures.toml", tmp_path / "out"
    figures.write_text(FIGURES.format(model="tiny", text="stdlib"), encoding="utf-8")
    small = ("--calibration", story, "--calibration-tokens", 128, "--seqlen", 64)
    done = here("quantize", tiny_folders["llama"], out, *small, "--method", "identity")
    assert done.returncode == 0, done.stderr
    done = here("report", out, "--against", figures, "--markdown", tmp_path / "x.md")
    assert done.returncode == 1
    assert "Manifest" in done.stderr
    assert not (tmp_path / "x.md").exists()
