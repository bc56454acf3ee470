"""Published figures: what a file of them may say, and what is compared with what."""

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from mxtorq.cli import app
from mxtorq.config import parse_method, parse_rounding, plan_from, read_settings, recipe_from
from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import NonOCPScale
from mxtorq.reports.against import Line, against_markdown, against_tables, lines_against
from mxtorq.reports.published import RULES, UNKNOWN, Published, read_published
from mxtorq.reports.schema import Results, Row

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "published.toml"
PAGE = ROOT / "docs" / "reproduce.md"

SMALL = """
[models.big]
names = ["Big-8B"]
[protocols.paper]
source = "A paper"
text = "wikitext2"
seqlen = 2048
calibration = "c4"
calibration_tokens = 262144
average = "acc5"
differs = ["ties differ"]
accuracy_differs = ["questions differ"]
[[baseline]]
model = "big"
protocol = "paper"
perplexity = 6.14
[[row]]
model = "big"
protocol = "paper"
called = "RTN"
method = "identity"
rounding = "rtn"
scale_rule = "floor"
perplexity = 8.23
accuracy = 64.11
tolerance = 0.03
"""
LAST = """
[[row]]
model = "big"
protocol = "paper"
called = "Other"
scale_rule = "floor"
perplexity = 7
"""
EVALUATION = {"source": "wikitext2:wiki.test.raw", "tokens": 288_768, "seqlen": 2048}
CALIBRATION = {"source": "c4", "tokens": 262_144, "text_sha256": "ab"}


def published(folder: Path, text: str = SMALL + LAST) -> Published:
    path = folder / "published.toml"
    path.write_text(text, encoding="utf-8")
    return read_published(path)


def row(method: str = "identity", rounding: str | None = "rtn", rule: str | None = "floor") -> Row:
    return Row(
        method=method,
        rounding=rounding,
        scale_rule=rule,
        perplexity=8.26,
        nll=math.log(8.26),
        predictions=9,
        seed=0,
        outliers=None,
        provenance={
            "model": "someone/big-8b",
            "evaluation": EVALUATION,
            "calibration": CALIBRATION,
        },
    )


def compared(ours: Row, file: Published) -> list[Line]:
    """The lines of a row of ours."""
    lines = lines_against(Results(rows=(ours,), versions={}), file)
    return [line for line in lines if line.ours != "-"]


def elsewhere(ours: Row, **evaluation: object) -> Row:
    return replace(ours, provenance={**ours.provenance, "evaluation": {**EVALUATION, **evaluation}})


# The file that is shipped.


def test_the_shipped_file_reads_and_names_what_exists() -> None:
    file = read_published(FILE)
    assert set(RULES) == {*ScaleRule, *NonOCPScale, UNKNOWN}
    for each in file.rows:
        if each.method is not None:
            parse_method(each.method)
        if each.rounding != UNKNOWN:
            parse_rounding(each.rounding)
    assert len({(r.model, r.protocol, r.called) for r in file.rows}) == len(file.rows)
    used = {r.protocol for r in file.rows}
    assert used == set(file.protocols)
    assert {r.model for r in file.rows} == set(file.models)


def test_the_harness_check_is_a_tolerance_of_the_file() -> None:
    """RTN under OCP floor: Llama-3-8B 8.23 +- 0.03, Qwen3-8B 11.83 +- 0.05."""
    file = read_published(FILE)
    found = {
        (r.model, round(r.perplexity, 2), r.tolerance)
        for r in file.rows
        if (r.name, r.rounding, r.scale_rule) == ("identity", "rtn", "floor")
        and r.tolerance is not None
        and r.perplexity is not None
    }
    assert ("Llama-3-8B", 8.23, 0.03) in found
    assert ("Qwen3-8B", 11.83, 0.05) in found


def test_figures_of_another_rule_say_so() -> None:
    """What released codes computed under rules of their own is never called floor."""
    rules = {(r.protocol, r.called): r.scale_rule for r in read_published(FILE).rows}
    assert rules["duquant++", "DuQuant++*"] == "log256"
    assert rules["duquant++", "MR-GPTQ"] == rules["mr-gptq", "MR-GPTQ"] == "four-thirds"
    assert rules["torq", "TORQ"] == rules["torq-summary", "TORQ"] == UNKNOWN


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B"),
        ("./models/llama-3-8b/", "Llama-3-8B"),
        (r"D:\models\Qwen3-8B", "Qwen3-8B"),
        ("/cache/models--Qwen--Qwen3-32B/snapshots/0123abc", "Qwen3-32B"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", None),
        ("Qwen/Qwen3-8B-Base", None),
        ("reference", None),
        ("", None),
        ("/", None),
    ],
)
def test_models_by_the_last_part_of_their_names(name: str, model: str | None) -> None:
    assert read_published(FILE).model_called(name) == model


# The reader.


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("tolerance", "tolerence", "did you mean 'tolerance'"),
        ("seqlen", "seqlength", "did you mean 'seqlen'"),
        ("[[baseline]]", "[[baselines]]", "did you mean 'baseline'"),
        ('scale_rule = "floor"', 'scale_rule = "flor"', "did you mean 'floor'"),
        ('model = "big"\nprotocol = "paper"\ncalled', 'model = "bigg"\nprotocol = "paper"\ncalled',
         "did you mean 'big'"),
        ('protocol = "paper"\ncalled', 'protocol = "papers"\ncalled', "did you mean 'paper'"),
        ('"acc5"', '"acc6"', "did you mean"),
        ('called = "RTN"\n', "", "called"),
        ("8.23", '"8.23"', "type"),
        ("8.23", "0.5", "none is below 1"),
        ("8.23", "nan", "none is below 1"),
        ("8.23", "inf", "none is below 1"),
        ("64.11", "164.11", "percent"),
        ("0.03", "-0.03", "tolerance"),
        ("2048", "true", "type int"),
        ("perplexity = 6.14", "", "nothing to compare with"),
        ("[[baseline]]", "[baseline]", "two brackets"),
        ("[models.big]", "[[models.big]]", "list"),
        ('names = ["Big-8B"]', 'names = ["Big-8B", "big-8b"]', "is one model's"),
        ('source = "A paper"', 'source = "A paper', "TOML"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_refused(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in SMALL
    with pytest.raises(UsageError) as raised:
        published(tmp_path, SMALL.replace(old, new, 1))
    assert expected in str(raised.value)
    assert all((raised.value.asked, raised.value.found, raised.value.why, raised.value.todo))


def test_two_baselines_of_one_model_and_source_are_refused(tmp_path: Path) -> None:
    again = SMALL[SMALL.index("[[baseline]]") : SMALL.index("[[row]]")]
    with pytest.raises(UsageError, match="two baselines"):
        published(tmp_path, SMALL + again)


def test_a_file_that_is_not_there_or_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="published figures"):
        read_published(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="MB"):
        published(tmp_path, "#" * 2**20)


# What is compared.


def test_the_same_rule_and_protocol_give_a_difference_and_a_verdict(tmp_path: Path) -> None:
    file = published(tmp_path)
    (line,) = compared(row(), file)
    # 8.26 - 8.23 is a little more than 0.03 in binary or a little less; as decimals it is equal.
    assert line.difference == pytest.approx(0.03)
    assert (line.published, line.within, line.called) == (8.23, "yes (±0.03)", "RTN")
    assert (line.differs, line.source) == ("ties differ", "A paper")
    (line,) = compared(replace(row(), perplexity=8.2601), file)
    assert line.within == "no (±0.03)"
    (line,) = compared(replace(row(), perplexity=8.1999), file)
    assert line.within == "no (±0.03)"
    (line,) = compared(replace(row(), perplexity=math.inf), file)
    assert line.within == "no (±0.03)"


def test_another_rule_is_shown_and_never_subtracted(tmp_path: Path) -> None:
    file = published(tmp_path)
    others = [row(rule="even"), row(rule="four-thirds"), replace(row(), activation_rule="even")]
    for ours in others:
        (line,) = compared(ours, file)
        assert (line.difference, line.within) == (None, "other rule")
        assert "scale rule floor there" in line.differs
    unknown = published(tmp_path, SMALL.replace('"floor"', '"unknown"'))
    (line,) = compared(row(), unknown)
    assert (line.difference, line.within) == (None, "rule unknown")


def test_a_trial_is_no_match(tmp_path: Path) -> None:
    """Other windows, or a part of the text: the difference is shown, and no verdict."""
    file = published(tmp_path)
    for change, said in (
        ({"seqlen": 1024}, "windows of 2048 there, 1024 here"),
        ({"tokens": 4096}, "the first 4,096 tokens of the text here"),
    ):
        (line,) = compared(elsewhere(row(), **change), file)
        assert (line.within, line.difference is None) == ("unknown", False)
        assert said in line.differs
    unfit = replace(row(), provenance={**row().provenance, "unfit": {"down_in": 100}})
    (line,) = compared(unfit, file)
    assert line.within == "unknown"


def test_calibration_counts_where_something_is_fitted(tmp_path: Path) -> None:
    text = SMALL.replace('"identity"', '"hadamard:size=128"').replace('"rtn"', '"gptq"')
    other = {"source": "wikitext2", "tokens": 65_536, "text_sha256": "ab"}
    plain = replace(row(), provenance={**row().provenance, "calibration": other})
    (line,) = compared(plain, published(tmp_path))
    assert line.within == "yes (±0.03)"  # rounding to nearest is fitted to nothing
    ours = replace(plain, method="hadamard", rounding="gptq:order=backward", options={"size": 32})
    (line,) = compared(ours, published(tmp_path, text))
    assert line.within == "unknown"
    for said in (
        "size 128 there, 32 here",
        "calibrated on c4 there, wikitext2 here",
        "262,144 calibration tokens there, 65,536 here",
    ):
        assert said in line.differs
    same = replace(ours, options={"size": 128}, provenance=row().provenance)
    (line,) = compared(same, published(tmp_path, text))
    assert line.within == "yes (±0.03)"


def test_what_has_no_pair_says_why(tmp_path: Path) -> None:
    file = published(tmp_path)
    for ours in (
        row(method="wush"),
        row(rounding="gptq"),
        elsewhere(row(), source="stdlib"),
        replace(row(), outliers="qwen3-0.6b"),
        replace(row(), provenance={**row().provenance, "model": "reference"}),
    ):
        (line,) = compared(ours, file)
        assert line.within == "no published row"
        assert line.difference is None
        assert line.published is None


def test_what_was_published_and_not_run_is_listed_once(tmp_path: Path) -> None:
    file = published(tmp_path)
    lines = lines_against(Results(rows=(row(), row(rule="even")), versions={}), file)
    left = [line for line in lines if line.within == "published, not run here"]
    assert [line.called for line in left] == ["Other"]
    nobody = replace(row(), provenance={**row().provenance, "model": "reference"})
    assert len(lines_against(Results(rows=(nobody,), versions={}), file)) == 1


def test_of_a_model_without_published_figures_one_sentence_is_said(tmp_path: Path) -> None:
    file = published(tmp_path)
    nobody = replace(row(), provenance={**row().provenance, "model": "reference"})
    alone = Results(rows=(nobody, replace(nobody, method="wush")), versions={})
    (said,) = against_tables(alone, file)
    assert str(said) == f"Nothing of 'reference' stands in {file.where}."
    text = against_markdown(alone, file)
    assert text.count("reference") == 1
    assert "no published row" not in text
    both = against_markdown(Results(rows=(row(), alone.rows[1]), versions={}), file)
    assert both.count("reference") == 1
    assert "Difference: ours less" in both
    assert "Nothing of" not in against_markdown(Results(rows=(row(),), versions={}), file)


def test_baselines_and_seeds(tmp_path: Path) -> None:
    bf16 = replace(row("bf16", None, None), perplexity=6.12, seed=None)
    two = replace(row(), perplexity=8.20, seed=1)
    lines = lines_against(Results(rows=(bf16, row(), two), versions={}), published(tmp_path))
    assert lines[0].difference == pytest.approx(-0.02)
    assert (lines[0].called, lines[0].differs) == ("BF16", "")
    assert lines[1].ours == "identity rtn (2 seeds)"
    assert lines[1].value == pytest.approx(8.23)


def test_accuracies_of_the_same_average(tmp_path: Path) -> None:
    ours = replace(row(), averages={"acc5": 0.65, "acc7": 0.1})
    lines = compared(ours, published(tmp_path))
    assert [line.figure for line in lines] == ["wikitext2 perplexity", "acc5 in %"]
    assert lines[1].difference == pytest.approx(0.89)
    assert lines[1].within == "unknown"  # a tolerance is of the perplexity
    assert "questions differ" in lines[1].differs
    trial = replace(ours, provenance={**ours.provenance, "tasks": {"limit": 8}})
    assert "8 documents of each task here" in compared(trial, published(tmp_path))[1].differs


def test_markdown_escapes_and_keeps_its_columns(tmp_path: Path) -> None:
    file = published(tmp_path, SMALL.replace('"RTN"', '"RTN|*<b>"'))
    lines = against_markdown(Results(rows=(row(),), versions={}), file).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert r"RTN\|\*\<b>" in table[2]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {12}


# The page of commands.


def commands() -> list[list[str]]:
    """The mxtorq command lines of the page, without the name of the program."""
    blocks = re.findall(r"^```(?:shell)?\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("mxtorq ")]


def parse(arguments: list[str]) -> dict[str, Any]:
    """The options that the command line makes of them, without running anything."""
    group: Any = typer.main.get_command(app)  # of click, or of the copy of it inside typer
    verb, *rest = arguments
    options: dict[str, Any] = group.commands[verb].make_context(verb, rest).params
    return options


def test_every_command_of_the_page_parses_and_names_files_that_exist() -> None:
    found = commands()
    assert len(found) > 15
    for arguments in found:
        options = parse(arguments)
        if options.get("against") is not None:
            assert ROOT / options["against"] == FILE
        named = options.get("recipe") or []
        for path in named if isinstance(named, list) else [named]:
            settings, evaluation = read_settings(ROOT / path)
            recipe_from(settings)
            assert plan_from(evaluation).text == "wikitext2"


def test_every_recipe_of_a_paper_stands_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = [path.stem for path in (ROOT / "recipes").glob("paper-*.toml")]
    assert len(names) > 10
    for name in names:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        settings, _ = read_settings(ROOT / "recipes" / f"{name}.toml")
        recipe = recipe_from(settings)
        assert f"| {recipe.scale_rule.value} | {recipe.calibration}" in line
        assert (recipe.calibration_tokens, recipe.seqlen) == (262_144, 2048)


def test_a_wrong_command_would_be_seen() -> None:
    with pytest.raises(KeyError):
        parse(["reproduce", "x"])
    with pytest.raises(Exception, match="--againts"):
        parse(["compare", "x", "--againts", "y"])
    with pytest.raises(Exception, match=r"(?i)record"):
        parse(["report", "--against", "y"])


def test_the_page_has_every_published_figure() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    for each in read_published(FILE).rows:
        called = each.called.replace("*", r"\*")
        start = f"| {each.model} | {each.scale_rule} | {called} |"
        rest = [line.removeprefix(start[:-1]) for line in lines if line.startswith(start)]
        found = [list(map(float, re.findall(r"(?<=\| )\d+\.\d+", line))) for line in rest]
        wanted = [value for value in (each.perplexity, each.accuracy) if value is not None]
        assert wanted in found, each
