"""The command line: parses, calls the pipeline, prints.

Every verb uses the same option names. Errors of ours end with exit code 1 and their four parts,
wrong usage with 2, Ctrl-C with 130. Heavy imports wait until a verb runs, so that ``--help`` is
quick.
"""

import os
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxtorq.console import (
    OUT,
    progress_bars,
    report_contents,
    report_results,
    report_written,
    require_writable,
    speaking,
    write_record,
)
from mxtorq.errors import UsageError

if TYPE_CHECKING:
    from mxtorq.config import EvaluationPlan, Recipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="MXFP4 W4A4 quantization of large language models, exact to the bit: TORQ and its rivals.",
    epilog="Start with [bold]mxtorq demo[/bold]. MODEL is a folder, a hub id, or "
    "[bold]reference[/bold], the small model inside this package.",
)
DEMO_METHODS = "identity,hadamard,torq,torq:levels=inter,torq:levels=intra"
DEMO_OUTLIERS = "qwen3-0.6b"

_MODEL = "A folder, a hub id, or [bold]reference[/bold]."
_METHOD = (
    "How inputs are transformed: identity (direct), hadamard (32 x 32), torq, with options as "
    "[bold]torq:levels=inter[/bold], or your own as package.module:Class."
)
_TEXT_HELP = "FILE (plain text, or .jsonl with a text field), stdlib, wikitext2, or wikitext2:FILE."

Method = Annotated[str, typer.Option("--method", help=_METHOD)]
Methods = Annotated[str, typer.Option("--methods", help="Comma-separated; each as in --method.")]
Rounding = Annotated[
    str,
    typer.Option(
        "--rounding", metavar="rtn|gptq", help="How weights are rounded. (gptq: not yet.)"
    ),
]
Rule = Annotated[
    str,
    typer.Option(
        "--scale-rule",
        metavar="floor|even|rceil|ceil|floor6|uos",
        help="The E8M0 rule of weights and activations. floor is OCP's.",
    ),
]
Calibration = Annotated[str, typer.Option("--calibration", metavar="FILE|NAME", help=_TEXT_HELP)]
CalibrationTokens = Annotated[
    int, typer.Option("--calibration-tokens", help="Tokens to calibrate on, in whole windows.")
]
Text = Annotated[str, typer.Option("--text", metavar="FILE|NAME", help=_TEXT_HELP)]
EvalTokens = Annotated[
    int | None,
    typer.Option("--eval-tokens", help="Tokens to evaluate on. [default: the whole text]"),
]
Seqlen = Annotated[
    int | None,
    typer.Option("--seqlen", help="Window length. [default: 2048, or the model's limit if less]"),
]
Seed = Annotated[int, typer.Option("--seed", help="Of calibration, fitting and outlier placement.")]
Outliers = Annotated[
    str | None,
    typer.Option(
        "--outliers",
        metavar="llama-3.2-1b|qwen3-0.6b",
        help="Rescale channels exactly to that LLM's activation profile first (for small models).",
    ),
]
Unfit = Annotated[
    bool,
    typer.Option("--allow-unfit", help="Keep sites of a width that 32 does not divide in BF16."),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, ...; auto takes an accelerator.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Also write the results as JSON.")
]

ManifestJson = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Also write the manifest as JSON.")
]


@app.command(
    epilog="Examples:\n\n"
    "  mxtorq quantize my-quantized-model\n\n"
    "  mxtorq quantize Qwen/Qwen3-0.6B out --calibration notes.jsonl --calibration-tokens 262144"
    "\n\n"
    "  mxtorq quantize ./llama out --method hadamard --scale-rule even"
)
def quantize(
    paths: Annotated[
        list[str], typer.Argument(metavar="[MODEL] OUT", help=f"{_MODEL} OUT must not exist.")
    ],
    method: Method = "torq",
    rounding: Rounding = "rtn",
    scale_rule: Rule = "floor",
    calibration: Calibration = "stdlib",
    calibration_tokens: CalibrationTokens = 65_536,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    outliers: Outliers = None,
    allow_unfit: Unfit = False,
    device: Device = "auto",
    json_path: ManifestJson = None,
) -> None:
    """Quantize MODEL to MXFP4 W4A4 and write a checkpoint that was read back and checked."""
    with speaking(f"nothing was written to {paths[-1]}"):
        if len(paths) > 2:
            raise UsageError(
                asked=f"quantize {' '.join(paths)}",
                found=f"{len(paths)} names",
                why="there are one or two: [MODEL] OUT",
                todo="quote names that hold spaces",
            )
        model, out = ("reference", paths[0]) if len(paths) == 1 else (paths[0], paths[1])
        from mxtorq import pipeline

        require_writable(json_path)
        recipe = _recipe(
            method,
            rounding,
            scale_rule,
            calibration,
            calibration_tokens,
            seqlen,
            seed,
            outliers,
            allow_unfit,
        )
        with progress_bars() as progress:
            manifest = pipeline.quantize(model, Path(out), recipe, device=device, progress=progress)
        report_written(Path(out), manifest)
        write_record(json_path, manifest.to_json())


@app.command(
    epilog="Examples:\n\n"
    "  mxtorq evaluate reference\n\n"
    "  mxtorq evaluate my-checkpoint --text wikitext2:wiki.test.raw --seqlen 2048 --json out.json"
)
def evaluate(
    model: Annotated[
        str, typer.Argument(help=f"{_MODEL} Or a checkpoint of mxtorq.")
    ] = "reference",
    text: Text = "stdlib",
    eval_tokens: EvalTokens = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    outliers: Outliers = None,
    device: Device = "auto",
    json_path: Json = None,
) -> None:
    """Perplexity of MODEL in BF16, or of a checkpoint in MXFP4 W4A4."""
    with speaking("no results were written"):
        from mxtorq import pipeline
        from mxtorq.config import EvaluationPlan

        plan = EvaluationPlan(text=text, eval_tokens=eval_tokens, seqlen=seqlen)
        require_writable(json_path)
        with progress_bars() as progress:
            results = pipeline.evaluate(
                model, plan, outliers=outliers, seed=seed, device=device, progress=progress
            )
        report_results(results, json_path, f"Perplexity of {model}")


@app.command(
    epilog="Examples:\n\n"
    "  mxtorq compare reference --outliers qwen3-0.6b\n\n"
    "  mxtorq compare ./llama --methods identity,hadamard,torq --text wikitext2:wiki.test.raw "
    "--calibration notes.jsonl --json results.json"
)
def compare(
    model: Annotated[str, typer.Argument(help=_MODEL)] = "reference",
    methods: Methods = "identity,hadamard,torq",
    rounding: Rounding = "rtn",
    scale_rule: Rule = "floor",
    calibration: Calibration = "stdlib",
    calibration_tokens: CalibrationTokens = 65_536,
    text: Text = "stdlib",
    eval_tokens: EvalTokens = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    outliers: Outliers = None,
    allow_unfit: Unfit = False,
    device: Device = "auto",
    json_path: Json = None,
) -> None:
    """One table in one run: BF16 first, then every method on the same model and text."""
    with speaking("no results were written"):
        recipes = [
            _recipe(
                name,
                rounding,
                scale_rule,
                calibration,
                calibration_tokens,
                seqlen,
                seed,
                outliers,
                allow_unfit,
            )
            for name in methods.split(",")
        ]
        _compare(model, recipes, _plan(text, eval_tokens, seqlen), device, json_path, model)


@app.command(epilog="Example:\n\n  mxtorq demo --json demo.json")
def demo(
    methods: Methods = DEMO_METHODS,
    scale_rule: Rule = "floor",
    outliers: Annotated[
        str, typer.Option("--outliers", help="The profile of the second half.")
    ] = DEMO_OUTLIERS,
    calibration_tokens: CalibrationTokens = 16_384,
    eval_tokens: Annotated[
        int, typer.Option("--eval-tokens", help="Tokens to evaluate on.")
    ] = 32_768,
    seed: Seed = 0,
    json_path: Json = None,
    keep: Annotated[
        Path | None,
        typer.Option("--out", metavar="OUT", help="Also keep the TORQ checkpoint here."),
    ] = None,
) -> None:
    """The whole path on the reference model: every method, without and with outliers, no network.

    Ends with a TORQ checkpoint written to disk, read back and compared with the model in memory.
    """
    with speaking("no results were written"):
        import tempfile

        from mxtorq import pipeline
        from mxtorq.export.checkpoint import require_absent
        from mxtorq.loading.source import REFERENCE

        recipes = [
            _recipe(
                name, "rtn", scale_rule, "stdlib", calibration_tokens, None, seed, profile, False
            )
            for profile in (None, outliers)
            for name in methods.split(",")
        ]
        if keep is not None:
            require_absent(keep)
        title = "The reference model in MXFP4 W4A4, without and with outlier channels"
        plan = _plan("stdlib", eval_tokens, None)
        _compare(REFERENCE, recipes, plan, "cpu", json_path, title)
        with tempfile.TemporaryDirectory() as scratch:
            out = keep or Path(scratch) / "reference-torq"
            final = _recipe(
                "torq", "rtn", scale_rule, "stdlib", calibration_tokens, None, seed, outliers, False
            )
            with progress_bars() as progress:
                manifest = pipeline.quantize(REFERENCE, out, final, device="cpu", progress=progress)
            report_written(out, manifest)
            if keep is None:
                OUT.print("It was a demonstration and is gone again; --out OUT keeps it.")


@app.command(epilog="Example:\n\n  mxtorq inspect my-checkpoint --json what.json")
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that quantize wrote.")],
    json_path: ManifestJson = None,
) -> None:
    """What a checkpoint is: method, rules, calibration, files (checked), every site's error."""
    with speaking("no results were written"):
        from mxtorq.export.checkpoint import read_manifest

        require_writable(json_path)
        manifest = read_manifest(checkpoint)
        report_contents(checkpoint, manifest)
        write_record(json_path, manifest.to_json())


def main() -> None:
    """Entry point of the ``mxtorq`` command."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A fresh 64 MB buffer costs less in huge pages; torch reads this when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGTERM, _interrupt)  # a polite kill cleans up as Ctrl-C does
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    app()


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _recipe(
    method: str,
    rounding: str,
    scale_rule: str,
    calibration: str,
    calibration_tokens: int,
    seqlen: int | None,
    seed: int,
    outliers: str | None,
    allow_unfit: bool,
) -> "Recipe":
    from mxtorq.config import Recipe, parse_method, unknown
    from mxtorq.formats.e8m0 import ScaleRule

    if scale_rule not in list(ScaleRule):
        raise unknown("scale rule", scale_rule, list(ScaleRule))
    return Recipe(
        method=parse_method(method),
        rounding=rounding,
        scale_rule=ScaleRule(scale_rule),
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        seqlen=seqlen,
        seed=seed,
        outliers=outliers,
        allow_unfit=allow_unfit,
    )


def _plan(text: str, eval_tokens: int | None, seqlen: int | None) -> "EvaluationPlan":
    from mxtorq.config import EvaluationPlan

    return EvaluationPlan(text=text, eval_tokens=eval_tokens, seqlen=seqlen)


def _compare(
    model: str,
    recipes: "list[Recipe]",
    plan: "EvaluationPlan",
    device: str,
    json_path: Path | None,
    title: str,
) -> None:
    from mxtorq import pipeline

    require_writable(json_path)
    with progress_bars() as progress:
        results = pipeline.compare(model, recipes, plan, device=device, progress=progress)
    report_results(results, json_path, title)


if __name__ == "__main__":
    main()
