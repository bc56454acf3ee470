"""The command as a user runs it: exit codes, messages and files.

Each verb, each exit code and whatever has to do with signals is seen in a process of its own
(`alone`); the rest, in this one (`here`).
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from command import alone, here
from mxtorq.config import rounding_name
from mxtorq.reports.schema import Results
from mxtorq.transforms.mxtorq.method import MXTORQ

SMALL = ("--calibration-tokens", 256, "--seqlen", 64)


def test_help_shows_verbs_options_and_examples() -> None:
    text = alone("--help").stdout
    for verb in ("quantize", "evaluate", "compare", "inspect", "demo"):
        assert verb in text
        assert "Example" in here(verb, "--help").stdout
    shared = ["--method", "--rounding", "--scale-rule", "--calibration", "--calibration-tokens"]
    text = here("quantize", "--help").stdout
    for option in [*shared, "--budget", "--seqlen", "--seed", "--outliers", "--allow-unfit"]:
        assert option in text, option
    lists = ["--recipe", "--methods", "--roundings", "--scale-rules", "--seeds", "--outliers"]
    others = ["--calibration", "--calibration-tokens", "--text", "--eval-tokens", "--seqlen"]
    text = here("compare", "--help").stdout
    asked = ["--tasks", "--task-files", "--limit", "--batch-size"]
    for option in [*lists, *others, *asked, "--json", "--resume", "--markdown", "--allow-unfit"]:
        assert option in text, option
    text = here("evaluate", "--help").stdout
    for option in [*asked, "--original", "--engine"]:
        assert option in text, option
    words = "".join(here("inspect", "--help").stdout.replace("│", "").split())
    for default in ("identity,hadamard,torq", "16384", "4096", "stdlib", "floor", "all"):
        assert f"[default:{default}]" in words, default


def test_quantize_inspect_evaluate_compare(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    model, out = tiny_folders["qwen3"], tmp_path / "out"
    common = ("--calibration", story, *SMALL)
    done = alone("quantize", model, out, *common, "--method", "torq:levels=inter")
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
    assert done.stdout.count("torq:levels=inter") == 1

    done = alone("inspect", out, "--json", tmp_path / "manifest.json")
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.down_in" in done.stdout
    assert json.loads((tmp_path / "manifest.json").read_text())["method"] == "torq:levels=inter"

    record = tmp_path / "evaluation.json"
    done = alone(
        "evaluate", out, "--text", story, "--seqlen", 64, "--eval-tokens", 256, "--json", record
    )
    assert done.returncode == 0, done.stderr
    (row,) = Results.from_json(record.read_text()).rows
    assert row.method == "torq:levels=inter"

    record = tmp_path / "comparison.json"
    done = here(
        "compare",
        model,
        *common,
        *("--methods", "identity,torq:levels=inter", "--text", story, "--eval-tokens", 256),
        *("--json", record),
    )
    assert done.returncode == 0, done.stderr
    results = Results.from_json(record.read_text())
    assert [r.method for r in results.rows] == ["bf16", "identity", "torq:levels=inter"]
    assert results.rows[2].perplexity == row.perplexity
    assert results.command.startswith("mxtorq compare")
    for line in results.rows:
        assert f"{line.perplexity:.4f}" in done.stdout


def test_compare_from_recipes_goes_on_with_its_record(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """Recipe files beside methods, options over both; a finished record is refused or gone on with,
    and the table is written as Markdown."""
    (tmp_path / "one.toml").write_text(
        f'method = "hadamard"\nrounding = "gptq"\ncalibration_tokens = 99\nseqlen = 64\n'
        f'[evaluation]\ntext = "{story}"\neval_tokens = 256\nseqlen = 64\n'
    )
    record, table = tmp_path / "record.json", tmp_path / "table.md"
    common = ("compare", tiny_folders["llama"], "--recipe", tmp_path / "one.toml")
    common = (*common, "--calibration", story, "--calibration-tokens", 256, "--json", record)
    done = here(*common)
    assert done.returncode == 0, done.stderr
    first = Results.from_json(record.read_text())
    assert [(r.method, r.rounding, r.seed) for r in first.rows] == [
        ("bf16", None, None),
        ("hadamard", "gptq", 0),
    ]
    assert first.rows[1].provenance["calibration"]["tokens"] == 256
    assert first.rows[1].provenance["evaluation"]["tokens"] == 256

    done = here(*common)
    assert done.returncode == 1
    assert "--resume" in done.stderr
    assert Results.from_json(record.read_text()) == first  # nothing was overwritten

    done = alone(*common, "--resume", "--seeds", "0,1", "--scale-rules", "floor,log256")
    assert done.returncode == 0, done.stderr
    results = Results.from_json(record.read_text())
    assert results.rows[:2] == first.rows
    assert [(r.seed, r.scale_rule) for r in results.rows[2:]] == [
        (0, "log256"),
        (1, "floor"),
        (1, "log256"),
    ]
    assert len(results.command.splitlines()) == 2

    done = here(*common, "--resume", "--markdown", table)
    assert done.returncode == 0, done.stderr
    text = table.read_text()
    assert "hadamard (2 seeds)" in text
    assert "no hardware has" in text


def test_quantize_chooses_by_itself(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """Without a method: mxtorq with the rounding it is made for, and in the manifest what each
    candidate loses; within a budget where one is named."""
    some = "mxtorq:candidates=identity+wush+layer-32+layer-64"
    for method, budget in (((), 128), (("--method", some, "--budget", 32), 32)):
        out = tmp_path / str(budget)
        common = ("quantize", tiny_folders["qwen3"], out, "--calibration", story, *SMALL)
        done = here(*common, *method)
        assert done.returncode == 0, done.stderr
        assert "bit for bit" in done.stdout
        manifest = json.loads((out / "mxtorq.json").read_text())
        assert manifest["method"] == (some.replace(":", ":budget=32:") if method else "mxtorq")
        corrected = "gptq:exponents=3:search=outputs:sweeps=2:inputs=corrected"
        assert manifest["rounding"] == corrected
        for site in manifest["sites"]:
            choice = site["choice"]
            least = min(choice["losses"].values())
            assert choice["losses"][choice["candidate"]] == least
            assert all(bound > least for bound in choice["at_least"].values())
            assert site["multiply_adds"] <= budget * site["width"]
        plan = ("--text", story, "--seqlen", 64, "--eval-tokens", 128)
        assert here("evaluate", out, *plan).returncode == 0


def test_methods_are_compared_with_one_rounding(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever is usual for each of them; a recipe file means what it means to quantize."""
    (tmp_path / "own.toml").write_text('method = "mxtorq"\n')
    common = ("compare", tiny_folders["qwen3"], "--methods", "hadamard,mxtorq")

    def asked(*more: object) -> list[str]:
        with mock.patch("mxtorq.cli.judge._compare") as compare:
            assert here(*common, *more, cwd=tmp_path).returncode == 0
        return [rounding_name(recipe.rounding) for recipe in compare.call_args.args[1]]

    assert asked() == ["rtn", "rtn"]
    assert asked("--roundings", "gptq") == ["gptq", "gptq"]
    assert asked("--recipe", "own.toml")[0] == MXTORQ.usual_rounding


def test_quantize_from_a_recipe(tiny_folders: dict[str, Path], story: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('method = "wush"\nseed = 5\n[rounding]\nname = "gptq"\norder = "backward"\n')
    out = tmp_path / "out"
    options = ("--recipe", recipe, "--calibration", story, *SMALL, "--seed", 7)
    done = here("quantize", tiny_folders["qwen3"], out, *options)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "mxtorq.json").read_text())
    assert (manifest["method"], manifest["rounding"]) == ("wush", "gptq:order=backward")
    assert manifest["seed"] == 7
    assert here("inspect", out).returncode == 0


def test_a_family_of_your_own(tiny_folders: dict[str, Path], story: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom mxtorq.models.llama import LLAMA\n"
        "MINE = replace(LLAMA, name='mine')\n"
    )
    model, own = tiny_folders["llama"], ("--family", "mine:MINE")
    text = ("--calibration", story, *SMALL, "--method", "hadamard")
    plan = ("--text", story, "--seqlen", 64, "--eval-tokens", 128)
    rows = ("--methods", "identity", "--calibration", story, "--calibration-tokens", 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)  # where `python -m` looks by itself
        done = here("quantize", model, "out", *text, *own, cwd=tmp_path)
        assert here("compare", model, *plan, *rows, *own, cwd=tmp_path).returncode == 0
        del sys.modules["mine"]
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "mxtorq.json").read_text())
    assert manifest["source"]["family"] == "mine"
    done = here("evaluate", "out", *plan, cwd=tmp_path)
    assert done.returncode == 1
    assert "--family package.module:NAME" in done.stderr
    assert alone("evaluate", "out", *plan, *own, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "MODEL", "OUT", "--family", "lama"), "did you mean 'llama'"),
        (("quantize", "MODEL", "OUT", "--family", "qwen3"), "of type 'llama'"),
        (("quantize", "MODEL", "OUT", "--family", "mxtorq.models:FAMILIES"), "no Family"),
        (("quantize", "MODEL", "OUT", "--family", "no_such_module:X"), "cannot be imported"),
        (("quantize", "./no-model", "OUT"), "hub id"),
        (("quantize", "a", "b", "c"), "[MODEL] OUT"),
        (("quantize", "MODEL", "OUT", "--method", "torc"), "did you mean 'torq'"),
        (("quantize", "MODEL", "OUT", "--scale-rule", "flor"), "did you mean 'floor'"),
        (("quantize", "MODEL", "OUT", "--rounding", "gptk"), "did you mean 'gptq'"),
        (("quantize", "MODEL", "OUT", "--rounding", "gptq:order=descending"), "scales=static"),
        (("quantize", "MODEL", "OUT", "--scale-rule", "log256"), "mxtorq compare"),
        (("quantize", "MODEL", "OUT", "--method", "brq"), "choose size=16"),
        (("quantize", "MODEL", "OUT", "--method", "wush:curvature=conditional"), "gptq"),
        (
            ("quantize", "MODEL", "OUT", "--method", "mxtorq:candidates=wusch"),
            "did you mean 'wush'",
        ),
        (("quantize", "MODEL", "OUT", "--method", "wush", "--budget", "32"), "the method mxtorq"),
        (("quantize", "MODEL", "OUT", "--rounding", "gptq:coherence=1"), "pass inputs=corrected"),
        (
            ("quantize", "MODEL", "OUT", "--calibration-tokens", "64", "--seqlen", "64"),
            "one window",
        ),
        (("quantize", "MODEL", "OUT", "--recipe", "none.toml"), "recipes/"),
        (("compare", "MODEL", "--seeds", "0,x"), "--seeds 0,1,2"),
        (("compare", "MODEL", "--resume"), "pass --json"),
        (("quantize", "MODEL", "OUT", "--seqlen", "4096"), "--seqlen 128 or less"),
        (("quantize", "MODEL", "OUT", "--calibration", "none.txt"), "FileNotFoundError"),
        (("quantize", "MODEL", "MODEL"), "nothing is overwritten"),
        (("evaluate", "MODEL", "--json", "no/such/folder/x.json"), "existing folder"),
        (("evaluate", "MODEL", "--outliers", "x"), "qwen3-0.6b"),
    ],
)
def test_errors_teach_and_write_nothing(
    arguments: tuple[str, ...], message: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = str(tiny_folders["llama"])
    done = here(*(model if a == "MODEL" else a for a in arguments), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stderr
    for part in ("asked:", "found:", "why:", "to do:"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_exit_code_2() -> None:
    assert here("quantise").returncode == 2
    assert here("quantize").returncode == 2
    assert here("evaluate", "reference", "--eval-tokens", "many").returncode == 2


@pytest.mark.parametrize(("arguments", "code"), [(("quantise",), 2), (("inspect", "none"), 1)])
def test_codes_and_messages_reach_the_shell(
    arguments: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    """A process of its own ends with them, and says what the function says in this one."""
    shell, function = alone(*arguments, cwd=tmp_path), here(*arguments, cwd=tmp_path)
    assert shell.returncode == function.returncode == code
    assert shell.stdout == function.stdout == ""
    said = [
        [line for line in done.stderr.splitlines() if not line.startswith(("Usage:", "Try "))]
        for done in (shell, function)  # those two lines name how it was called
    ]
    assert said[0] == said[1]
    assert len(said[0]) >= 3


def started(model: Path, folder: Path, *options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "mxtorq", "quantize", str(model), "out"),
            *("--calibration-tokens", "128000", "--seqlen", "128", *map(str, options)),
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell script inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupted(
    work: "subprocess.Popen[str]", when: Callable[[], bool], how: signal.Signals = signal.SIGINT
) -> str:
    """What a process says that is interrupted when something is so."""
    deadline = time.monotonic() + 120
    while not when() and work.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert work.poll() is None, work.communicate()
    work.send_signal(how)
    _, errors = work.communicate(timeout=60)
    assert work.returncode == 130
    return errors


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_quickly_and_leaves_nothing(
    how: signal.Signals, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Interrupted when OUT.partial is there, so that there is something to clean up."""
    work = started(tiny_folders["llama"], tmp_path)
    errors = interrupted(work, lambda: (tmp_path / "out.partial").exists(), how)
    assert "Interrupted: nothing was written to out" in errors
    left = sorted(path.name for path in tmp_path.iterdir())
    if "will clear out.partial" in errors:  # a busy machine: its three seconds were over
        assert left == ["out.lock", "out.partial"]
        assert not list((tmp_path / "out.partial").rglob("0*.json"))
    else:
        assert left == []


def test_an_interrupted_run_goes_on_when_it_is_asked_for_again(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    model, record = tiny_folders["qwen3"], tmp_path / "out.partial" / "layers" / "00000.json"
    # So many tokens that the second layer takes longer than it takes to see the first one's record.
    options = ("--calibration-tokens", 60_000, "--method", "hadamard")
    errors = interrupted(started(model, tmp_path, *options), record.exists)
    kept = "1 of 2 layers is finished"
    assert f"Interrupted: {kept} and kept in out.partial; run the same command again" in errors
    done = alone(
        *("quantize", model, "out", "--seqlen", 128, *options),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert f"Going on: {kept} in out.partial" in done.stderr
    assert "bit for bit" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.log"]


def test_a_dry_run_says_what_is_needed_and_writes_nothing(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    model = tiny_folders["llama"]
    common = ("quantize", model, "out", *SMALL, "--calibration", story, "--dry-run")
    common = (*common, "--method", "hadamard")
    done = here(*common, "--rounding", "gptq", "--json", "needs.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("memory (", "disk (", "activations", "quantized layers", "by a probe"):
        assert words in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["needs.json"]
    needs = json.loads((tmp_path / "needs.json").read_text())
    assert needs["seconds"] > 0
    assert needs["layers"] == 2
    for budget in needs["budgets"]:
        assert budget["needed"] == sum(budget["parts"].values()) <= budget["free"]
    done = here(*common, "--activation-memory", "4XB", cwd=tmp_path)
    assert done.returncode == 1
    assert "--activation-memory 4GB" in done.stderr


def test_demo_shows_every_method_without_and_with_outliers(tmp_path: Path) -> None:
    record = tmp_path / "demo.json"
    done = alone(
        "demo",
        *("--methods", "hadamard,wush", "--json", record, "--out", tmp_path / "kept"),
        *("--calibration-tokens", 1024, "--eval-tokens", 1024),
    )
    assert done.returncode == 0, done.stderr
    rows = Results.from_json(record.read_text()).rows
    made = [("bf16", None), ("identity", "rtn"), ("hadamard", "gptq"), ("wush", "gptq")]
    assert [(row.method, row.rounding) for row in rows] == made * 2
    assert [row.outliers for row in rows] == [None] * 4 + ["qwen3-0.6b"] * 4
    assert "Not a measurement of that LLM" in " ".join(done.stdout.split())  # lines are wrapped
    assert "bit for bit" in done.stdout
    assert here("inspect", tmp_path / "kept").returncode == 0
