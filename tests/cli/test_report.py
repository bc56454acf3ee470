"""``--report`` of the verbs that make records, and the verb that draws them again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mxtorq.cli import app
from mxtorq.reports import charts
from mxtorq.reports.pages import read_record

RECORDS = Path(__file__).parents[2] / "docs" / "results"
DEMO = RECORDS / "demo.json"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_verb_draws_its_record_and_the_record_draws_the_same(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="charts need the extra `report`")
    out, model = tmp_path / "out", tiny_folders["llama"]
    small = ("--calibration", story, "--calibration-tokens", 128, "--seqlen", 64)
    text = ("--text", story, "--eval-tokens", 128)
    runs = {
        "quantize": ("quantize", model, out, *small, "--method", "hadamard"),
        "evaluate": ("evaluate", out, *text, "--seqlen", 64),
        "compare": ("compare", model, *small, *text, "--methods", "identity"),
    }
    for verb, arguments in runs.items():
        json_path, html = tmp_path / f"{verb}.json", tmp_path / f"{verb}.html"
        done = run(*arguments, "--json", json_path, "--report", html)
        assert done.exit_code == 0, done.output
        assert "Report written" in done.output
        printed = run("report", json_path)
        assert printed.exit_code == 0, printed.output
        if verb == "quantize":
            assert "hadamard" in printed.output
        else:  # the same table, line for line
            tables = [
                [line for line in shown.splitlines() if line[:1] in tuple("┃│")]
                for shown in (done.output, printed.output)
            ]
            assert tables[0] == tables[1] != []
        again = tmp_path / "again.html"  # there already from the second on, and replaced
        assert run("report", json_path, "--report", again).exit_code == 0
        assert again.read_bytes() == html.read_bytes()
        assert "<svg" in html.read_text(encoding="utf-8")
    assert run("report", out, "--report", again).exit_code == 0
    assert again.read_bytes() == (tmp_path / "quantize.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_what_a_method_chose_is_told_everywhere(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="charts need the extra `report`")
    out, model = tmp_path / "out", tiny_folders["llama"]
    small = ("--calibration", story, "--calibration-tokens", 512, "--seqlen", 64)
    text = ("--text", story, "--eval-tokens", 128)
    method = "mxtorq:candidates=identity+hadamard"
    how = ("--method", method, "--rounding", "rtn")  # compare has that unless told otherwise
    done = run("quantize", model, out, *small, *how, "--report", tmp_path / "a.html")
    assert done.exit_code == 0, done.output
    sites = json.loads((out / "mxtorq.json").read_text(encoding="utf-8"))["sites"]
    chosen = {site["site"]: site["choice"]["candidate"] for site in sites}
    assert chosen
    told = [f"{name} at " for name in set(chosen.values())]
    assert " chosen " in done.output
    card = (out / "README.md").read_text(encoding="utf-8")
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "What was chosen" in html
    evaluated = run("evaluate", out, *text, "--seqlen", 64, "--json", tmp_path / "b.json")
    assert evaluated.exit_code == 0, evaluated.output
    assert "Chosen by mxtorq" in evaluated.output
    for said in (card, html, evaluated.output, run("report", out).output):
        assert all(each in said for each in told)
    compared = run(
        *("compare", model, *small, *text, "--methods", method, "--json", tmp_path / "c.json")
    )
    assert compared.exit_code == 0, compared.output
    assert "Chosen by mxtorq" in compared.output
    for name in ("b", "c"):
        rows = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        assert rows[-1]["choices"] == chosen


def test_markdown_of_any_record(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert run("report", DEMO, "--markdown", page).exit_code == 0
    assert "| bf16 |" in page.read_text(encoding="utf-8")


def test_without_options_the_tables_are_printed(tmp_path: Path) -> None:
    """Those of any record, and nothing is written."""
    done = run("report", DEMO)
    assert done.exit_code == 0, done.output
    rows = json.loads(DEMO.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        assert f"{row['perplexity']:.4f}" in done.output
    assert "written" not in done.output
    (tmp_path / "empty.json").write_text("{}")
    assert run("report", tmp_path / "empty.json").exit_code == 1


def test_drawing_an_old_record_loads_no_model_library(tmp_path: Path) -> None:
    code = (
        "import sys; from mxtorq.cli import app\n"
        f"try: app(['report', {str(DEMO)!r}, '--markdown', {str(tmp_path / 'x.md')!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "x.md").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"schema": "mxtorq.benchmarks.bench"}', "mxtorq.benchmarks.bench"),
        ('{"schema": ["mxtorq.results"]}', "schema"),
        ('{"schema": "mxtorq.results", "version": 99}', "version 99"),
        ('{"schema": "mxtorq.manifest", "version": 1}', "version 1"),
        ("[]", "type list"),
        ("{", "JSONDecodeError"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, found: str) -> None:
    record = tmp_path / "record.json"
    record.write_text(text)
    done = run("report", record, "--markdown", tmp_path / "x.md")
    assert done.exit_code == 1
    assert found in done.output
    assert not (tmp_path / "x.md").exists()


def test_a_report_never_overwrites_what_it_is_made_from(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_bytes(DEMO.read_bytes())
    for option in ("--report", "--markdown"):
        done = run("report", record, option, record)
        assert done.exit_code == 1
        assert record.read_bytes() == DEMO.read_bytes()
    done = run("compare", "reference", "--json", tmp_path / "a", "--report", tmp_path / "a")
    assert done.exit_code == 1
    assert "one would overwrite the other" in done.output
    assert run("report", tmp_path / "none.json", "--markdown", tmp_path / "x").exit_code == 1


def test_nothing_begins_without_the_plotting_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    report = ("--report", tmp_path / "x.html")
    for arguments in (("quantize", tmp_path / "out"), ("evaluate",), ("compare",)):
        done = run(*arguments, *report)
        assert done.exit_code == 1
        assert "mxtorq[report]" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_has_nothing_to_report(tmp_path: Path) -> None:
    done = run("quantize", tmp_path / "out", "--dry-run", "--report", tmp_path / "x.html")
    assert done.exit_code == 1
    assert "--dry-run" in done.output


def test_the_published_records_are_read() -> None:
    for path in sorted(RECORDS.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        if json.loads(text).get("schema") == "mxtorq.results":
            read_record(text, path.name)
