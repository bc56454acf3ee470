"""The verb that writes a checkpoint in the layout of another tool.

What is written and how it is checked stands in `export.convert`, which Python callers use.
"""

from pathlib import Path
from typing import Annotated

import typer

from mxtorq.cli.app import app
from mxtorq.console import (
    progress_bars,
    report_exported,
    require_writable,
    speaking,
    write_record,
)

EXAMPLES = (
    "Examples:\n\n"
    "  mxtorq export my-checkpoint model.gguf --format gguf\n\n"
    "  mxtorq export my-checkpoint for-amd --format quark\n\n"
    "  mxtorq export my-checkpoint weights-only --format fake-quant --undo-transforms"
)

Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="gguf|quark|fake-quant|compressed-tensors",
        help="gguf: a file for llama.cpp. quark: AMD's layout. compressed-tensors: stock engines. "
        "fake-quant: plain BF16 weights for any evaluator; inputs are not rounded there.",
    ),
]


@app.command(epilog=EXAMPLES)
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A folder that quantize wrote, or MXFP4 of compressed-tensors or AMD Quark."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A new folder; of gguf a new file NAME.gguf.")
    ],
    format: Format,
    undo_transforms: Annotated[
        bool,
        typer.Option(
            "--undo-transforms",
            help="fake-quant: bring transformed weights back, rounded to BF16 once more.",
        ),
    ] = False,
    without_tokenizer: Annotated[
        bool,
        typer.Option(
            "--without-tokenizer",
            help="gguf: leave the tokenizer out, where llama.cpp does not have it.",
        ),
    ] = False,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="PATH", help="Also write what was written as JSON."),
    ] = None,
) -> None:
    """Write the same codes and scales in the layout of another tool, read back and compared.

    What a layout cannot say, such as transforms that run online, is refused with the reason.
    """
    with speaking(f"nothing was written to {out}"):
        from mxtorq.export.convert import export as convert

        require_writable(json_path)
        with progress_bars() as progress:
            done = convert(
                checkpoint,
                out,
                format,
                undo_transforms=undo_transforms,
                without_tokenizer=without_tokenizer,
                progress=progress,
            )
        report_exported(out, done.linears, done.notes)
        write_record(json_path, done.to_json())
