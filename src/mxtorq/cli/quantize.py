"""The verb that makes a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxtorq.console import (
    progress_bars,
    report_needs,
    report_written,
    require_report,
    require_writable,
    speaking,
    what_is_left,
    write_record,
    write_report,
)
from mxtorq.errors import UsageError
from mxtorq.options import (
    MODEL_HELP,
    ActivationMemory,
    Budget,
    Calibration,
    CalibrationTokens,
    DeterministicReduce,
    Device,
    DryRun,
    ManifestJson,
    Method,
    Outliers,
    OwnFamily,
    RecipeFile,
    Report,
    Rounding,
    Rule,
    Seed,
    Seqlen,
    Target,
    Unfit,
    bytes_of,
)

if TYPE_CHECKING:
    pass

from mxtorq.cli.app import app, given

DEFAULT_METHOD = "mxtorq"


@app.command(
    epilog="Examples:\n\n"
    "  mxtorq quantize my-quantized-model\n\n"
    "  mxtorq quantize Qwen/Qwen3-0.6B out --calibration notes.jsonl --calibration-tokens 262144"
    "\n\n"
    "  mxtorq quantize ./llama out --budget 32 --calibration notes.jsonl\n\n"
    "  mxtorq quantize ./llama out --method hadamard --scale-rule even\n\n"
    "  mxtorq quantize ./llama out --method hadamard --rounding gptq --target vllm-blackwell\n\n"
    "  mxtorq quantize ./llama out --activation-memory 8GB --dry-run\n\n"
    "  torchrun --nproc-per-node 8 -m mxtorq quantize ./llama out"
)
def quantize(
    paths: Annotated[
        list[str], typer.Argument(metavar="[MODEL] OUT", help=f"{MODEL_HELP} OUT must not exist.")
    ],
    recipe: RecipeFile = None,
    method: Method = None,
    budget: Budget = None,
    rounding: Rounding = None,
    scale_rule: Rule = None,
    target: Target = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    outliers: Outliers = None,
    allow_unfit: Unfit = None,
    family: OwnFamily = None,
    device: Device = "auto",
    activation_memory: ActivationMemory = None,
    deterministic_reduce: DeterministicReduce = False,
    dry_run: DryRun = False,
    json_path: ManifestJson = None,
    report: Report = None,
) -> None:
    """Quantize MODEL to MXFP4 W4A4 and write a checkpoint that was read back and checked.

    The same command goes on where an earlier one was stopped, after its last finished layer.
    """
    named = given(
        method=method,
        rounding=rounding,
        scale_rule=scale_rule,
        target=target,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        seqlen=seqlen,
        seed=seed,
        outliers=outliers,
        allow_unfit=allow_unfit,
    )
    with speaking(what_is_left(Path(paths[-1]))):
        if len(paths) > 2:
            raise UsageError(
                asked=f"quantize {' '.join(paths)}",
                found=f"{len(paths)} names",
                why="there are one or two: [MODEL] OUT",
                todo="quote names that hold spaces",
            )
        model, out = ("reference", paths[0]) if len(paths) == 1 else (paths[0], paths[1])
        from mxtorq import pipeline
        from mxtorq.beginnings import silent
        from mxtorq.config import (
            parse_family,
            parse_scale,
            read_settings,
            recipe_from,
            require_ocp,
            with_budget,
        )
        from mxtorq.loading.source import pick_device
        from mxtorq.preflight.check import require
        from mxtorq.ranks import ranks_from_environment

        require_writable(json_path)
        require_report(report, json_path)
        if dry_run and report is not None:
            raise UsageError(
                asked="--report with --dry-run",
                found="nothing that will be quantized",
                why="a report shows what each site lost",
                todo="leave one of them out; --json keeps what the run will need",
            )
        settings = read_settings(recipe)[0] if recipe else {"method": DEFAULT_METHOD}
        asked = {**settings, **named}
        if "scale_rule" in asked:  # before what a usual rounding would say of it
            require_ocp(parse_scale(str(asked["scale_rule"])))
        chosen = with_budget(recipe_from(asked), budget)
        arguments: dict[str, Any] = {
            "family": parse_family(family),
            "activation_memory": bytes_of("--activation-memory", activation_memory),
        }
        if dry_run:
            with progress_bars() as progress:
                needs = pipeline.preview(
                    model, Path(out), chosen, device=device, **arguments, progress=progress
                )
            report_needs(needs)
            write_record(json_path, needs.to_json())
            require(needs)
            return
        place, exact = pick_device(device), deterministic_reduce
        with ranks_from_environment(place, exact=exact) as ranks, progress_bars() as progress:
            manifest = pipeline.quantize(
                model,
                Path(out),
                chosen,
                device=str(ranks.device),
                **arguments,
                announce=report_needs,
                progress=progress if ranks.leads else silent,
                ranks=ranks,
            )
        if ranks.leads:
            report_written(Path(out), manifest)
            write_record(json_path, manifest.to_json())
            write_report(report, manifest)
