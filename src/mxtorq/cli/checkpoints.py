"""The verb that judges checkpoints: verify."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mxtorq.console import (
    progress_bars,
    report_diagnosis,
    require_writable,
    speaking,
    write_record,
)
from mxtorq.options import (
    MODEL_HELP,
    EvalTokens,
    Json,
    OwnFamily,
    Text,
)

if TYPE_CHECKING:
    pass

from mxtorq.cli.app import app


@app.command(
    epilog="Examples:\n\n"
    "  mxtorq verify my-checkpoint --engine vllm-blackwell\n\n"
    "  mxtorq verify my-checkpoint --original ./llama --json diagnosis.json"
)
def verify(
    checkpoint: Annotated[
        Path, typer.Argument(help="A folder of mxtorq's, compressed-tensors' or Quark's making.")
    ],
    original: Annotated[
        str | None,
        typer.Option("--original", help="The model that it was made from: " + MODEL_HELP),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="Exit with 3 unless this engine runs it as W4A4."),
    ] = None,
    text: Text = None,
    eval_tokens: EvalTokens = None,
    family: OwnFamily = None,
    json_path: Json = None,
) -> None:
    """Whether an MXFP4 checkpoint is sound, and which engine runs it as what.

    Exit code 0: nothing is wrong. 3: something is. 1 and 2: it could not be examined.
    """
    with speaking("no results were written"):
        from mxtorq.config import parse_family
        from mxtorq.doctor.engines import ENGINES
        from mxtorq.doctor.examination import TOKENS, examine
        from mxtorq.reports.findings import SICK
        from mxtorq.specs import unknown

        if engine is not None and engine not in ENGINES:
            raise unknown("engine", engine, ENGINES)
        require_writable(json_path)
        with progress_bars() as progress:
            diagnosis = examine(
                checkpoint,
                original=original,
                text=text or "stdlib",
                tokens=eval_tokens or TOKENS,
                family=parse_family(family),
                progress=progress,
            )
        report_diagnosis(diagnosis)
        write_record(json_path, diagnosis.to_json())
        runs = {verdict.engine: verdict.runs_as for verdict in diagnosis.engines}
        if not diagnosis.healthy or (engine is not None and runs[engine] != "W4A4"):
            raise typer.Exit(SICK)
