"""Every command of the documentation runs: each shell block of every page and of the README.

The blocks of a page run from its first to its last in one folder (`world`, tests/docs/conftest.py),
so a page can only use what it made, or a name that stands there. Three things differ from what a
reader types, and nothing else:

    SIZES       options that are added to a verb, so that a run takes a second; the last one counts
    stand-ins   models and texts, see conftest
    ELSEWHERE   programs that cannot run here, each with the reason and with what is checked instead

A comment ``# exit code 3`` in a line says that the command ends with that code. Python blocks run
in the same folder, those of a page in one namespace. No other block may look like commands. Pages
that tools write (docs/results) name the commands that made them; their options are read and what
they ask for is made, without running it.
"""

import inspect
import re
import runpy
import shlex
import shutil
import tomllib
import typing
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from unittest import mock

import pytest

from command import here
from mxtorq.cli.app import app

ROOT = Path(__file__).parents[2]
HOOK = runpy.run_path(str(ROOT / "docs" / "hooks" / "commands.py"))

SIZES = {
    "quantize": "--calibration-tokens 64 --seqlen 32",
    "evaluate": "--eval-tokens 256 --seqlen 32",
    "compare": "--calibration-tokens 64 --eval-tokens 256 --seqlen 32",
    "inspect": "--calibration-tokens 64 --seqlen 32",
    "verify": "--eval-tokens 256",
    "demo": "--calibration-tokens 128 --eval-tokens 1024 --methods identity",
    "export": "",
    "report": "",
}
PRELUDE = {
    "docs/cli.md": "mxtorq quantize my-llama my-checkpoint --method identity\n"
    "mxtorq compare ./llama --methods identity --text wikitext2:wiki.test.raw "
    "--calibration notes.jsonl --json results.json\n"
}
"""What a page of examples takes for granted. There each command stands for itself, so that what it
makes is removed before the next one."""
MADE = ("out", "out.json", "page.html", "model.gguf", "for-amd", "weights-only")

TASKS = "--task-files tasks --limit 1"
"""Added where a command asks tasks: documents come from a folder, and are few."""

FENCE = re.compile(r"^( *)(```+) *([\w+-]*)[^\n`]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^\n|\A)((?:^ {4,}.*\n)+)", re.MULTILINE)
PROGRAM = re.compile(
    r"^\s*(?:\$ )?(mxtorq|pip|make|vllm|torchrun|python|python3|\w+=\S+) ", re.MULTILINE
)
INLINE = re.compile(r"`(mxtorq [a-z][^`]*)`")


def pages() -> dict[str, str]:
    """Every page that a person wrote, the README, and the page of commands as it is built."""
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
    }
    written = {"docs/results/README.md"}
    texts = {n: t for n, t in texts.items() if not n.startswith("docs/results/") or n in written}
    texts["docs/cli.md"] = texts["docs/cli.md"].replace(HOOK["MARK"], HOOK["commands"]())
    return texts


PAGES = pages()


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and content."""
    return [(found[3], found[4]) for found in FENCE.finditer(text)]


def lines(block: str) -> list[tuple[list[str], int]]:
    """The commands of a shell block as words, with the exit code that each should have."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        code = re.search(r"# exit code (\d+)", line)
        words = shlex.split(line, comments=True)
        if words:
            found.append((words, int(code[1]) if code else 0))
    return found


def run_mxtorq(words: list[str], code: int, world: Path) -> None:
    """A command of ours, with small sizes."""
    assert words[1:], words
    verb = words[1]
    assert verb in SIZES, f"no verb {verb!r}: {shlex.join(words)}"
    added = SIZES[verb].split()
    if verb == "inspect":
        if (world / words[2] / "mxtorq.json").exists():
            added = []  # a checkpoint is read, not measured
        if "--sensitivity" in words:
            added += ["--eval-tokens", "64"]
    if "--seeds" in words:
        added += ["--seeds", "0"]
    if "--tasks" in words:
        added += TASKS.split()
    done = here(*words[1:], *added, cwd=world)
    assert done.returncode == code, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def extras(words: list[str], world: Path) -> None:
    """`pip install`: the extras exist."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if found := re.fullmatch(r"(?:mxtorq|\.)\[(.+)\]", word):
            assert set(found[1].split(",")) <= set(known), words


def targets(words: list[str], world: Path) -> None:
    """`make`: the target exists."""
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words[1:] if "=" not in word} <= set(known), words


def folder(words: list[str], world: Path) -> None:
    """`vllm serve`: what it is to read was made, or is there."""
    assert words[1] == "serve"
    assert (world / words[2] / "config.json").exists(), words


def launched(words: list[str], world: Path) -> None:
    """`torchrun`: what each process is to run, in one process."""
    at = words.index("-m")
    assert words[at + 1] == "mxtorq", words
    run_mxtorq(words[at + 1 :], 0, world)


def script(words: list[str], world: Path) -> None:
    """A script of the repository: it is there, and its source names every option."""
    path = next(word for word in words if word.endswith((".py", ".sh")))
    source = (ROOT / path).read_text()
    if path.endswith(".py"):
        source += (ROOT / "benchmarks" / "record.py").read_text()
        for word in words:
            assert not word.startswith("--") or word.split("=")[0] in source, (path, word)


def files(words: list[str], world: Path) -> None:
    """Cutting a text in two: nothing of ours."""


ELSEWHERE: dict[str, tuple[str, Callable[[list[str], Path], None]]] = {
    "pip": ("installs from an index", extras),
    "make": ("builds environments", targets),
    "vllm": ("another environment; tests_vllm starts it", folder),
    "torchrun": ("several processes; tests/test_distributed.py has them", launched),
    "python": ("minutes; the benchmarks and tools have tests of their own", script),
    "head": ("its file does not travel with the project", files),
    "tail": ("its file does not travel with the project", files),
    "benchmarks/methods.sh": ("hours", script),
}


def run(words: list[str], code: int, world: Path) -> None:
    """One command of a page."""
    while re.fullmatch(r"\w+=.*", words[0]):  # environment variables
        words = words[1:]
    if words[0] == "mxtorq":
        run_mxtorq(words, code, world)
        return
    assert words[0] in ELSEWHERE, f"nobody runs {words[0]!r}: {shlex.join(words)}"
    ELSEWHERE[words[0]][1](words, world)


RUNNABLE = [
    name
    for name, text in PAGES.items()
    if any(language in ("shell", "python") for language, _ in blocks(text))
]


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_page_runs(name: str, world: Path) -> None:
    namespace: dict[str, object] = {"__name__": "page"}
    for words, code in lines(PRELUDE.get(name, "")):
        run(words, code, world)
    for language, block in blocks(PAGES[name]):
        if language == "shell":
            for words, code in lines(block):
                if name in PRELUDE:
                    clear(world)
                run(words, code, world)
        elif language == "python":
            with chdir(world):
                exec(compile(block, name, "exec"), namespace)


def clear(world: Path) -> None:
    for name in MADE:
        if (world / name).is_dir():
            shutil.rmtree(world / name)
        (world / name).unlink(missing_ok=True)
    for log in world.glob("*.log"):
        log.unlink()


def strays(text: str) -> list[str]:
    """Commands of a page that no test would run."""
    bare = [block for language, block in blocks(text) if language not in ("shell", "python")]
    outside = FENCE.sub("", text)
    return [
        found[0].strip()
        for block in [*bare, *INDENTED.findall(outside)]
        for found in [PROGRAM.search(block)]
        if found
    ]


def unknown(text: str) -> list[str]:
    """Commands in running text with a verb or an option that there is none of."""
    verbs = [c.callback for c in app.registered_commands if c.callback is not None]
    known = {verb.__name__: options(verb) for verb in verbs}
    wrong = []
    for found in INLINE.findall(FENCE.sub("", text)):
        verb, *words = found.split()[1:]
        given = {word.rstrip(",.;") for word in words if word.startswith("--")}
        if verb not in known or not given <= known[verb] | {"--help"}:
            wrong.append(found)
    return wrong


def options(function: Callable[..., object]) -> set[str]:
    """The options of a verb, by the annotations that typer reads."""
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        option
        for name in inspect.signature(function).parameters
        for option in HOOK["options"](typing.get_args(hints[name])[1])
    }


@pytest.mark.parametrize("name", PAGES)
def test_no_command_is_left_out(name: str) -> None:
    assert strays(PAGES[name]) == []
    assert unknown(PAGES[name]) == []


def test_commands_of_records_are_commands(world: Path) -> None:
    """Those that made the tables of docs/results: every option is known, every recipe is legal."""
    asked = []
    for path in sorted((ROOT / "docs" / "results").glob("*.md")):
        for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            line = line.strip().strip("`")
            if line.startswith("mxtorq compare "):
                with mock.patch("mxtorq.cli.judge._compare") as compare:
                    done = here(*shlex.split(line)[1:], cwd=world)
                assert done.returncode == 0, (path.name, line, done.stderr)
                asked.append(compare.call_args.args[1])
            elif line.startswith("python benchmarks/"):
                script(shlex.split(line), world)
    assert asked
    assert all(asked)


def test_these_tests_can_fail(world: Path) -> None:
    for wrong in ("mxtorq quantise reference out", "mxtorq quantize reference out --metod torq"):
        with pytest.raises(AssertionError):
            run(shlex.split(wrong), 0, world)
    for wrong in ("cargo build", "make no-such-target", "pip install 'mxtorq[no-such-extra]'"):
        with pytest.raises(AssertionError):
            run(shlex.split(wrong), 0, world)
    for wrong in ("vllm serve nothing", "python benchmarks/bench.py --no-such-option"):
        with pytest.raises(AssertionError):
            run(shlex.split(wrong), 0, world)
    assert strays("```\n$ mxtorq evaluate reference\n```\n")
    assert strays("Text:\n\n    mxtorq evaluate reference\n")
    assert unknown("Say `mxtorq evaluate --no-such-option`.")
    assert unknown("Say `mxtorq evaluat`.")
