"""The verb that looks inside: of a checkpoint what it is, of a model what MXFP4 sees of it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mxtorq.cli.app import app, given
from mxtorq.console import (
    progress_bars,
    report_contents,
    report_inspection,
    require_report,
    require_writable,
    speaking,
    write_record,
    write_report,
)
from mxtorq.errors import UsageError
from mxtorq.options import (
    MODEL_HELP,
    Calibration,
    Device,
    Json,
    Markdown,
    Outliers,
    OwnFamily,
    Report,
    Rule,
    Seed,
    Seqlen,
    Text,
    Unfit,
)

METHODS = "identity,hadamard,torq"
TOKENS = 16_384
HARM_TOKENS = 4096


@app.command(
    epilog="Examples:\n\n"
    "  mxtorq inspect my-checkpoint --json what.json\n\n"
    "  mxtorq inspect reference --methods torq,duquant++ --outliers qwen3-0.6b\n\n"
    "  mxtorq inspect ./llama --sites down_in --sensitivity --report page.html"
)
def inspect(
    model: Annotated[str, typer.Argument(help=f"A checkpoint of mxtorq, or a model: {MODEL_HELP}")],
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Comma-separated; each as in quantize --method. identity is always measured. "
            f"\\[default: {METHODS}]",
        ),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            "--sites",
            metavar="KIND|NAME,...",
            help="qkv_in, o_in, gate_up_in, down_in, or full names. \\[default: all]",
        ),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Also quantize one site at a time: which of them hurt the model most.",
        ),
    ] = False,
    scale_rule: Rule = None,
    calibration: Calibration = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option("--calibration-tokens", help=f"Tokens to measure on. \\[default: {TOKENS}]"),
    ] = None,
    text: Text = None,
    eval_tokens: Annotated[
        int | None,
        typer.Option(
            "--eval-tokens", help=f"Tokens that --sensitivity is about. \\[default: {HARM_TOKENS}]"
        ),
    ] = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    outliers: Outliers = None,
    allow_unfit: Unfit = None,
    family: OwnFamily = None,
    device: Device = "auto",
    json_path: Json = None,
    markdown: Markdown = None,
    report: Report = None,
) -> None:
    """What a checkpoint is; or how evenly a model fills MXFP4, before and after each transform.

    Of a checkpoint: method, rules, calibration, files (checked), every site's error. Of a model,
    for inputs and weights of its linears: how loud the loudest block of 32 is, how evenly the
    codes of E2M1 are used, what becomes 0 or is cut, loud channels, massive tokens.
    """
    with speaking("no results were written"):
        from mxtorq.export.checkpoint import is_checkpoint, read_manifest

        require_writable(json_path)
        require_writable(markdown)
        require_report(report, json_path, markdown)
        shared = given(
            scale_rule=scale_rule,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            seqlen=seqlen,
            seed=seed,
            outliers=outliers,
            allow_unfit=allow_unfit,
        )
        plan = given(text=text, eval_tokens=eval_tokens)
        if is_checkpoint(Path(model)):
            refuse_measuring(
                model, {**shared, **plan, **given(methods=methods, sites=sites, markdown=markdown)}
            )
            manifest = read_manifest(Path(model))
            report_contents(Path(model), manifest)
            write_record(json_path, manifest.to_json())
            write_report(report, manifest)
            return
        from mxtorq.config import parse_family, plan_from, recipe_from
        from mxtorq.inspection.examination import inspect as examine

        if plan and not sensitivity:
            raise UsageError(
                asked=f"{' and '.join(_option(name) for name in plan)} without --sensitivity",
                found="an inspection that evaluates nothing",
                why="inputs are measured on the calibration text",
                todo="pass --sensitivity too, or --calibration and --calibration-tokens instead",
            )
        settings = {"calibration_tokens": TOKENS, "rounding": "rtn", **shared}
        recipes = [
            recipe_from({**settings, "method": name}) for name in (methods or METHODS).split(",")
        ]
        harm = {"eval_tokens": HARM_TOKENS, **plan, **given(seqlen=seqlen)}
        with progress_bars() as progress:
            inspection = examine(
                model,
                recipes,
                sites=tuple(sites.split(",")) if sites else (),
                harm=plan_from(harm) if sensitivity else None,
                device=device,
                family=parse_family(family),
                progress=progress,
            )
        report_inspection(inspection, json_path, markdown, report)


def refuse_measuring(checkpoint: str, options: dict[str, Any]) -> None:
    """Refuse options that only a model can serve.

    Raises:
        UsageError: some were given.
    """
    if options:
        raise UsageError(
            asked=f"{', '.join(_option(name) for name in options)} of {checkpoint}",
            found="a checkpoint, whose weights are rounded already",
            why="what transforms do is measured on the model before they are applied",
            todo="inspect the model that it was made from, or the checkpoint without options",
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
