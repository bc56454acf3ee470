"""One MXFP4 model in other layouts: what a caller and the command line ask for.

    gguf                 a file for llama.cpp           `gguf`
    quark                a folder for Quark and vLLM    `quark`
    compressed-tensors   a folder for stock engines     `compressed_tensors`
    fake-quant           a plain BF16 folder            `fake_quant`

Codes and scales are copied, never computed again, and compared with their source after writing. The
result appears whole or not at all. What a layout cannot say is refused with the reason.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from mxtorq.errors import UsageError
from mxtorq.export.appearing import appearing
from mxtorq.export.gguf import write_gguf
from mxtorq.export.layouts import write_fake_quant, write_packed
from mxtorq.export.output import require_absent
from mxtorq.export.packed import read_packed
from mxtorq.writing import fingerprint

SCHEMA = "mxtorq.export"
VERSION = 1


class Format(StrEnum):
    """What a model can be exported to."""

    GGUF = "gguf"
    QUARK = "quark"
    FAKE_QUANT = "fake-quant"
    COMPRESSED_TENSORS = "compressed-tensors"


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    format: str
    source: str
    """The folder that it was made from, by its own name."""
    method: str | None
    """As the manifest says, where there is one."""
    rounding: str | None
    input_rule: str | None
    """The scale rule that the model was made with; None where inputs are not quantized."""
    linears: int
    """How many are quantized."""
    notes: list[str]
    """What a reader of it must know."""
    files: dict[str, dict[str, object]]
    """``sha256`` and ``bytes`` of every file."""

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, "version": VERSION, **asdict(self)}, indent=1) + "\n"


def export(
    checkpoint: str | Path,
    out: str | Path,
    format: Format | str,
    *,
    undo_transforms: bool = False,
    without_tokenizer: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Export:
    """Write an MXFP4 model in another layout.

    Args:
        checkpoint: a folder that `quantize` wrote, or one of compressed-tensors' or Quark's MXFP4.
        out: a folder that does not exist; of ``gguf`` a file.
        format: see `Format`.
        undo_transforms: of ``fake-quant``: bring weights of transformed inputs back to the original
            coordinates, rounded to BF16 once more.
        without_tokenizer: of ``gguf``: leave the tokenizer out.
        progress: told how far it is.

    Raises:
        UsageError: the layout cannot say what the model is.
        CheckpointError: the source is damaged, or says more than codes and scales.
        OutputError: ``out`` exists, or the disk is full or refuses.
        VerificationError: what was read back differs.
    """
    chosen, target = _format(format), Path(out)
    for option, given, owner in (
        ("--undo-transforms", undo_transforms, Format.FAKE_QUANT),
        ("--without-tokenizer", without_tokenizer, Format.GGUF),
    ):
        if given and chosen is not owner:
            raise UsageError(
                asked=f"{option} with --format {chosen.value}",
                found=f"an option of {owner.value}",
                why="it would change nothing",
                todo="leave it out",
            )
    require_absent(target)
    if chosen is Format.GGUF and target.suffix != ".gguf":
        raise UsageError(
            asked=f"a GGUF file {target}",
            found="a name that does not end in .gguf",
            why="it is one file, and llama.cpp finds it by that ending",
            todo=f"name it {target.name}.gguf",
        )
    model = read_packed(Path(checkpoint))

    def told(done: int, total: int) -> None:
        progress("export", done, total)

    with appearing(target) as staging:
        if chosen is Format.GGUF:
            notes = write_gguf(model, staging, told, without_tokenizer=without_tokenizer)
        elif chosen is Format.FAKE_QUANT:
            notes = write_fake_quant(model, staging, told, undo_transforms=undo_transforms)
        else:
            notes = write_packed(model, staging, chosen.value, told)
        paths = sorted(staging.iterdir()) if staging.is_dir() else [staging]
        names = [target.name if path == staging else path.name for path in paths]
        files = {name: fingerprint(path) for name, path in zip(names, paths, strict=True)}
    manifest = model.manifest
    return Export(
        format=chosen.value,
        source=model.folder.name,
        method=manifest.method if manifest else None,
        rounding=manifest.rounding if manifest else None,
        input_rule=model.input_rule.value if model.input_rule else None,
        linears=len(model.linears),
        notes=notes,
        files=files,
    )


def _format(name: Format | str) -> Format:
    try:
        return Format(name)
    except ValueError as error:
        raise UsageError(
            asked=f"an export to {name!r}",
            found=f"the formats {', '.join(each.value for each in Format)}",
            why="only these are written",
            todo="name one of them",
        ) from error
