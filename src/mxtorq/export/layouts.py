"""Exports that are transformers folders: tensors layer by layer, config.json, tokenizer, a README.

    quark                the same bytes under Quark's names
    compressed-tensors   the same bytes under those of compressed-tensors
    fake-quant           the values of the codes in BF16

What was written is opened again and compared with its source tensor by tensor before the folder
gets its name.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxtorq.errors import UsageError, VerificationError
from mxtorq.export.checkpoint import COMPANIONS, CONFIG, place_tensors
from mxtorq.export.compressed_tensors import quantization_config
from mxtorq.export.fake_quant import fake_quantized, require_plain, untransformed
from mxtorq.export.packed import Packed
from mxtorq.export.quark import quark_config
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.reading.documents import Refusal
from mxtorq.reading.shards import open_shards
from mxtorq.writing import join_files, write_tensors, write_text

WEIGHTS = "model.safetensors"
README = "README.md"

Progress = Callable[[int, int], None]


def write_packed(model: Packed, folder: Path, layout: str, progress: Progress) -> list[str]:
    """Fill a folder with the same codes and scales in another layout; returns what to know of it.

    Args:
        model: read by `read_packed`.
        folder: is made.
        layout: ``quark`` or ``compressed-tensors``.
        progress: told (groups done, groups in all).

    Raises:
        UsageError: the layout cannot say what the model is.
        VerificationError: what was read back differs.
    """
    require_merged(model, f"the layout {layout!r}")
    if layout == "quark":
        endings = ("weight", "weight_scale")
        described = quark_config(exclude=model.unquantized, input_rule=model.input_rule)
        notes = quark_notes(model)
    else:
        endings = ("weight_packed", "weight_scale")
        described = quantization_config(own=False, ignore=model.unquantized, transforms={})
        if model.input_rule is None:
            described["config_groups"]["group_0"]["input_activations"] = None
        notes = compressed_tensors_notes(model)
    sources = {
        f"{linear}.{ending}": name
        for linear, pair in model.linears.items()
        for ending, name in zip(endings, pair, strict=True)
    }
    sources |= {name: name for name in model.plain}

    def put(path: Path, names: list[str]) -> None:
        join_files(path, {name: model.shards.entry(sources[name]) for name in names})

    def expected(name: str) -> Tensor:
        return model.shards.tensor(sources[name])

    grouped = [
        [*(f"{linear}.{end}" for linear in group.linears for end in endings), *group.plain]
        for group in model.groups()
    ]
    _write(model, folder, grouped, put, expected, progress)
    config = {**model.config, "quantization_config": described}
    _finish(model, folder, config, notes)
    return notes


def write_fake_quant(
    model: Packed, folder: Path, progress: Progress, *, undo_transforms: bool = False
) -> list[str]:
    """Fill a folder with a plain BF16 model of the quantized values; as `write_packed`.

    Args:
        model: read by `read_packed`.
        folder: is made.
        progress: told (groups done, groups in all).
        undo_transforms: bring weights of transformed sites back, with one more rounding.

    Raises:
        UsageError: there are transforms and nobody asked to undo them.
        FormatError: a value does not fit BF16.
        VerificationError: what was read back differs.
    """
    require_plain(model, undo_transforms=undo_transforms)
    sites = {linear: entry for entry in model.online for linear in entry.linears}

    def value(name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        if name in plain:
            return model.shards.tensor(name)
        if linear not in sites:
            return fake_quantized(model.codes(linear), linear)
        return untransformed(model.codes(linear), model.transform(sites[linear]), linear)

    def put(path: Path, names: list[str]) -> None:
        write_tensors(path, {name: value(name) for name in names})

    plain = set(model.plain)
    grouped = [
        [*(f"{linear}.weight" for linear in group.linears), *group.plain]
        for group in model.groups()
    ]
    _write(model, folder, grouped, put, value, progress)
    notes = fake_quant_notes(model)
    config = {**model.config, "dtype": "bfloat16", "mxtorq_fake_quant": " ".join(notes)}
    _finish(model, folder, config, notes)
    return notes


def require_merged(model: Packed, target: str) -> None:
    """Refuse a model with transforms that run online.

    Raises:
        UsageError: with how many and what else there is.
    """
    if not model.online:
        return
    kinds = sorted({entry.kind for entry in model.online})
    raise UsageError(
        asked=f"{model.folder} in {target}",
        found=f"{len(model.online)} of {len(model.manifest.sites if model.manifest else [])} "
        f"inputs with a transform that runs online ({', '.join(kinds)})",
        why="what reads it would run the model without the transforms, which gives noise. Methods "
        "that merge everything into weights are identity, and smoothquant where norms take its "
        "factors; torq, duquant++, wush, hadamard, quarot, spinquant and most others keep a part "
        "online",
        todo="quantize with a method that merges everything, or serve the checkpoint as it is with "
        "`mxtorq.load`; for its weights alone: --format fake-quant --undo-transforms",
    )


def quark_notes(model: Packed) -> list[str]:
    """What a reader of a Quark folder must know."""
    rule = model.input_rule
    if rule is None:
        return ["Weights are MXFP4, inputs are not quantized (W4A16)."]
    if not model.records_rule:
        return [
            f"The source does not record how inputs were rounded when it was made; "
            f"scale_calculation_mode is {rule.value!r}, compressed-tensors' own rule."
        ]
    return [
        f"Inputs were rounded by the scale rule {rule.value!r} when it was made, which "
        "scale_calculation_mode records. Quark follows it; vLLM does not read it, and its kernels "
        "round by rules of their own."
    ]


def compressed_tensors_notes(model: Packed) -> list[str]:
    """What a reader of a compressed-tensors folder must know."""
    rule = model.input_rule
    if rule is None:
        return ["Weights are MXFP4, inputs are not quantized (W4A16)."]
    notes = ["Without the manifest of mxtorq: no method, calibration or errors are recorded."]
    if rule is not ScaleRule.EVEN:
        notes.append(
            f"Inputs were rounded by the scale rule {rule.value!r} when it was made. The layout "
            "cannot record that: compressed-tensors rounds by 'even', kernels by their own rule."
        )
    return notes


def fake_quant_notes(model: Packed) -> list[str]:
    """What a reader of a fake-quantized folder must know."""
    notes = [
        "Weights only: the linears hold the values of their MXFP4 codes in BF16, and the inputs "
        "are never rounded. Figures of this folder are those of W4A16, not of W4A4."
    ]
    if model.online:
        notes.append(
            f"The weights of {len(model.online)} inputs with a transform T are W' T^T, brought "
            "back to the original coordinates and rounded to BF16 once more (up to 2^-9 of each "
            "value): they are no MXFP4 values any more."
        )
    else:
        notes.append("Every value is exact.")
    return notes


def _write(
    model: Packed,
    folder: Path,
    groups: list[list[str]],
    put: Callable[[Path, list[str]], None],
    expected: Callable[[str], Tensor],
    progress: Progress,
) -> None:
    pieces = folder / ".pieces"
    pieces.mkdir(parents=True)
    paths = [pieces / f"{number:05d}.safetensors" for number in range(len(groups))]
    for number, (path, names) in enumerate(zip(paths, groups, strict=True)):
        progress(number, 2 * len(groups))
        put(path, names)
    place_tensors(folder, WEIGHTS, paths)
    shutil.rmtree(pieces)
    found = open_shards(folder, _refusal(folder))
    if sorted(found.names) != sorted(name for names in groups for name in names):
        raise _differs("names of tensors", folder)
    for number, names in enumerate(groups, len(groups)):
        progress(number, 2 * len(groups))
        for name in names:
            if not _same(expected(name), found.tensor(name)):
                raise _differs(name, folder)
    progress(2 * len(groups), 2 * len(groups))


def _finish(model: Packed, folder: Path, config: Mapping[str, Any], notes: list[str]) -> None:
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    for name in COMPANIONS:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    text = [f"# {folder.name.removeprefix('.').removesuffix('.exporting')}", *notes]
    if model.manifest is not None:
        source = model.manifest
        text.append(
            f"Made by mxtorq from {source.source['model']}: method {source.method}, rounding "
            f"{source.rounding}, scale rule {source.scale_rules['weights']}, seed {source.seed}."
        )
    write_text(folder / README, "\n\n".join(text) + "\n")


def _same(expected: Tensor, found: Tensor) -> bool:
    """Equal in dtype, shape and bits; NaN and signs of zero included."""
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        return False
    return torch.equal(_bytes(expected), _bytes(found))


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().flatten().view(torch.uint8)


def _refusal(folder: Path) -> Refusal:
    return Refusal(
        kind=VerificationError,
        asked=f"the export {folder}",
        why="a file of it is not as it was written a moment ago",
        todo="look after the disk, and run the same command again",
    )


def _differs(what: str, folder: Path) -> VerificationError:
    return _refusal(folder)(f"{what}, read back, is not what was written")  # type: ignore[return-value]
