"""The options that verbs share: one name, one meaning and one help text each.

Also what comma-separated lists and several recipe files come to.
"""

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from mxtorq.errors import UsageError

MODEL_HELP = "A folder, a hub id, or [bold]reference[/bold]."
_METHOD = (
    "How inputs are transformed: mxtorq (at each site the candidate that loses least), identity "
    "(direct), hadamard, torq, duquant++, wush, quarot, ..., with options as "
    "[bold]torq:levels=inter[/bold], or your own as package.module:Class."
)
_ROUNDING = "How weights are rounded: rtn, gptq, with options as [bold]gptq:order=backward[/bold]."
_CORRECTED = "gptq:exponents=3:search=outputs:sweeps=2:inputs=corrected"
_RULE = (
    "The scale rule of weights, and of activations unless the target has its own; floor is OCP's. "
    "compare also takes log256 and four-thirds, which no hardware has."
)
_TARGETS = "mxtorq|vllm-blackwell|vllm-emulation|rocm|transformers"
_TARGET = (
    "Who will run it: decides by which rule activations are rounded, and which transforms can run "
    "online. mxtorq: with mxtorq installed, every transform, one rule."
)
_TEXT_HELP = "FILE (plain text, or .jsonl with a text field), stdlib, wikitext2, or wikitext2:FILE."
_RECIPE = "A TOML file with these settings; options given here take precedence."
_OUTLIERS = "Rescale channels exactly to that LLM's activation profile first (for small models)."

# None means: not given, so that the recipe file or the default of `Recipe` decides.
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help=_RECIPE)]
RecipeFiles = Annotated[
    list[Path] | None,
    typer.Option("--recipe", metavar="FILE", help=f"{_RECIPE} Repeat it to compare recipes."),
]
Method = Annotated[str | None, typer.Option("--method", help=f"{_METHOD} \\[default: mxtorq]")]
Methods = Annotated[
    str | None, typer.Option("--methods", help="Comma-separated; each as in quantize --method.")
]
Rounding = Annotated[
    str | None,
    typer.Option(
        "--rounding",
        help=f"{_ROUNDING} \\[default: what the method is made for: {_CORRECTED} for mxtorq, else "
        "rtn]",
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        "--budget",
        help="Of mxtorq: the multiply-adds that a token may cost at run time, for each channel of "
        "an input; 0 for none, 32 for one block matrix. Short for [bold]mxtorq:budget=N[/bold]. "
        "\\[default: 128]",
    ),
]
Roundings = Annotated[
    str | None, typer.Option("--roundings", help=f"Comma-separated. {_ROUNDING} \\[default: rtn]")
]
_RULES = "floor|even|rceil|ceil|floor6|uos"
Rule = Annotated[
    str | None,
    typer.Option("--scale-rule", metavar=_RULES, help=f"{_RULE} \\[default: floor]"),
]
Rules = Annotated[
    str | None, typer.Option("--scale-rules", help=f"Comma-separated. {_RULE} \\[default: floor]")
]
Target = Annotated[
    str | None, typer.Option("--target", metavar=_TARGETS, help=f"{_TARGET} \\[default: mxtorq]")
]
Targets = Annotated[
    str | None, typer.Option("--targets", help=f"Comma-separated. {_TARGET} \\[default: mxtorq]")
]
MismatchTargets = Annotated[
    str | None,
    typer.Option(
        "--targets",
        help="Comma-separated: also evaluate a checkpoint as these round activations. Shows what "
        "it costs to run it where it was not made for. All of: "
        "vllm-blackwell,vllm-emulation,rocm,transformers.",
    ),
]
Original = Annotated[
    str | None,
    typer.Option(
        "--original",
        metavar="MODEL",
        help="Of a checkpoint: the model that it was made from. Also how far the checkpoint is "
        "from it: KL, top token, layer by layer. Both are in memory at a time.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option("--calibration", metavar="FILE|NAME", help=f"{_TEXT_HELP} \\[default: stdlib]"),
]
CalibrationTokens = Annotated[
    int | None,
    typer.Option(
        "--calibration-tokens",
        help="Tokens to calibrate on, in whole windows. \\[default: 65536]",
    ),
]
Text = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE|NAME", help=f"{_TEXT_HELP} \\[default: stdlib]"),
]
EvalTokens = Annotated[
    int | None,
    typer.Option("--eval-tokens", help="Tokens to evaluate on. \\[default: the whole text]"),
]
Seqlen = Annotated[
    int | None,
    typer.Option("--seqlen", help="Window length. \\[default: 2048, or the model's limit if less]"),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Of calibration, fitting and outlier placement. \\[default: 0]"),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds", help="Comma-separated; the table gives mean and spread. \\[default: 0]"
    ),
]
Outliers = Annotated[
    str | None,
    typer.Option("--outliers", metavar="llama-3.2-1b|qwen3-0.6b", help=_OUTLIERS),
]
OutliersList = Annotated[
    str | None,
    typer.Option(
        "--outliers", metavar="none,llama-3.2-1b,...", help=f"Comma-separated. {_OUTLIERS}"
    ),
]
Unfit = Annotated[
    bool | None,
    typer.Option("--allow-unfit", help="Keep sites of a width that 32 does not divide in BF16."),
]
ActivationMemory = Annotated[
    str | None,
    typer.Option(
        "--activation-memory",
        metavar="SIZE",
        help="Up to how much, as in 4GB or 512MB, calibration activations stay in memory; more are "
        "read from disk. \\[default: what is free, at most a quarter]",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say what the run will need and how long it will take, and stop there."
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, ...; auto takes an accelerator.")]
DeterministicReduce = Annotated[
    bool,
    typer.Option(
        "--deterministic-reduce",
        help="Under torchrun: give the bytes of one process, by sums in its order. Every rank then "
        "gets the inputs of every site from all others.",
    ),
]
OwnFamily = Annotated[
    str | None,
    typer.Option(
        "--family",
        metavar="package.module:NAME",
        help="A model family of your own, an object of mxtorq.models.family.Family. A checkpoint "
        "that was made with one needs it again.",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="acc7,piqa,...",
        help="Also the accuracy on tasks of the lm-evaluation-harness, by its names "
        "([bold]hellaswag:shots=10[/bold] with examples), or by those of papers' averages: acc7, "
        "acc5, acc4. Needs the extra [bold]tasks[/bold].",
    ),
]
TaskFiles = Annotated[
    Path | None,
    typer.Option(
        "--task-files",
        metavar="FOLDER",
        help="Documents of the tasks, as FOLDER/piqa.jsonl and so on, instead of the hub's.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", help="Ask the first documents of each task alone, to try it out."),
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="torch|vllm",
        help="Who answers the tasks; vllm reads the folder by itself. The perplexity is torch's.",
    ),
]
TensorParallel = Annotated[
    int, typer.Option("--tensor-parallel", help="Devices that vLLM divides the model among.")
]
BatchSize = Annotated[
    str,
    typer.Option(
        "--batch-size",
        metavar="auto|N",
        help="Prompts of tasks at once; auto fills the memory of an accelerator.",
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Also write the results as JSON.")
]
RecordJson = Annotated[
    Path | None,
    typer.Option("--json", metavar="PATH", help="Write the results as JSON, row by row."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the record at --json instead of refusing it.")
]
Markdown = Annotated[
    Path | None, typer.Option("--markdown", metavar="PATH", help="Also write the table there.")
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="PATH.html", help="Also write a page with charts there, in one file."
    ),
]
Against = Annotated[
    Path | None,
    typer.Option(
        "--against",
        metavar="FILE",
        help="Published figures, such as docs/published.toml: also print ours beside them, and add "
        "that to --markdown and --report.",
    ),
]
ManifestJson = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Also write the manifest as JSON.")
]
_UNITS = {
    **{unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))},
    **{unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), 1)},
}


def bytes_of(option: str, text: str | None) -> int | None:
    """The bytes that ``4GB``, ``1.5 GB`` or ``2GiB`` are.

    Raises:
        UsageError: it is none of these.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{1,3})\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise UsageError(
            asked=f"{option} {text}",
            found=f"{text!r:.100}",
            why="a size is a number and a unit: B, kB, MB, GB, TB (of 1000), KiB, MiB, GiB, TiB "
            "(of 1024)",
            todo=f"pass one such as {option} 4GB",
        )
    return int(Fraction(found[1]) * _UNITS[found[2].upper()])


def whole_number(option: str, text: str) -> int | None:
    """The number that an option says; None for ``auto``.

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(
            asked=f"{option} {text}",
            found=f"{text!r:.100}",
            why=f"{option} is a whole number or auto",
            todo=f"pass one such as {option} 16, or {option} auto",
        )
    return int(text)


def every_choice(lists: dict[str, str]) -> list[dict[str, Any]]:
    """Every combination of comma-separated values: outliers slowest, then seeds."""
    choices: list[dict[str, Any]] = [{}]
    for name in ("outliers", "seed", "rounding", "scale_rule", "target"):
        if name in lists:
            values = [_value(name, text) for text in lists[name].split(",")]
            choices = [{**choice, name: value} for choice in choices for value in values]
    return choices


def _value(name: str, text: str) -> Any:
    if name == "outliers":
        return None if text == "none" else text
    if name != "seed":
        return text
    if not text.strip().isdigit():
        raise UsageError(
            asked=f"--seeds {text}",
            found=f"the seed {text!r}",
            why="a seed is a whole number from 0",
            todo="pass numbers with commas, as in --seeds 0,1,2",
        )
    return int(text)


def agreed(plans: list[dict[str, Any]]) -> dict[str, Any]:
    """The [evaluation] table of the recipe files, which must be the same in all that have one."""
    for plan in plans[1:]:
        if plan != plans[0]:
            raise UsageError(
                asked="recipes with different [evaluation] tables in one comparison",
                found=f"{plans[0]} and {plan}",
                why="rows on different texts are not comparable",
                todo="compare them in runs of their own, or make the tables equal",
            )
    return plans[0] if plans else {}
