"""A quantized model into the files of a checkpoint, and the proof of it.

The inverse of `loading.checkpoint`. What a checkpoint keeps beside the codes are the model's other
tensors in BF16 (they were read as BF16, so that loses nothing), tied ones once.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxtorq.calibration.capture import LayerInput
from mxtorq.errors import VerificationError
from mxtorq.export.carried import is_carried, transform_config
from mxtorq.export.checkpoint import place_tensors, place_transforms, read_checkpoint, write_config
from mxtorq.export.compressed_tensors import (
    OWN,
    STOCK,
    WEIGHTS,
    WEIGHTS_FILE,
    quantization_config,
)
from mxtorq.export.unfinished import Unfinished
from mxtorq.loading.at_rest import stored_parts, stored_value
from mxtorq.loading.checkpoint import restored_layers
from mxtorq.loading.skeleton import stored_names
from mxtorq.loading.source import Source
from mxtorq.writing import fingerprint, write_tensors


def write_checkpoint(folder: Path, source: Source, run: Unfinished) -> dict[str, dict[str, Any]]:
    """Fill a folder with a checkpoint whose layers a run has finished, all but its manifest.

    Returns:
        What the manifest says of the files.

    Raises:
        OSError: the disk is full or refuses.
    """
    family = source.family
    modules = source.model.named_modules()
    linears = [name for name, module in modules if isinstance(module, nn.Linear)]
    plain = [name for name in linears if not name.startswith(f"{family.layers}.")]
    plain += [name for layer in run.layers for name in layer.kept]
    sites = [site for layer in run.layers for site in layer.sites]
    transformed = [site for site in sites if site.kind != "identity"]
    config = json.loads(source.config.to_json_string())
    config["dtype"] = "bfloat16"
    described = quantization_config(
        own=not all(map(is_carried, transformed)),
        ignore=sorted([*plain, *routers(source)]),
        transforms=transform_config(transformed),
    )
    config["quantization_config"] = described
    pieces = run.pieces()
    for name in outside_layers(source):  # one by one: an embedding is as large as some layers
        pieces.append(run.folder / f"{name}.safetensors")
        write_tensors(pieces[-1], {name: stored_value(source, name)})
    placed = place_tensors(folder, WEIGHTS_FILE[OWN if transformed else STOCK], pieces)
    if transformed:
        described[WEIGHTS] = placed
    place_transforms(folder, run.pieces("-transforms.safetensors"))
    write_config(folder, config)
    try:
        source.tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # what the tokenizers library raises for a full disk
        raise OSError(f"the tokenizer's files: {error}") from error
    generation: Any = source.model.generation_config
    generation.save_pretrained(folder)
    return {path.name: fingerprint(path) for path in sorted(folder.iterdir())}


def kept_linears(source: Source, index: int, layer: nn.Module) -> list[str]:
    """The linears of a quantized layer that stay in BF16, by full name."""
    parts = layer.named_modules()
    return [source.family.linear_name(index, n) for n, m in parts if isinstance(m, nn.Linear)]


def routers(source: Source) -> list[str]:
    """The full names of what reads a quantized site's input and stays in BF16."""
    family = source.family
    readers = [path for site in family.sites for path in site.kept_readers]
    layers = range(len(list(source.model.get_submodule(family.layers).children())))
    return [family.linear_name(index, path) for index in layers for path in readers]


def outside_layers(source: Source) -> list[str]:
    """The tensors that a checkpoint has beside those of the decoder layers."""
    names = stored_names(source.model, source.family)
    return [name for name in names if not name.startswith(f"{source.family.layers}.")]


def stored_tensors(source: Source, index: int, layer: nn.Module) -> dict[str, Tensor]:
    """A quantized layer's tensors as a checkpoint keeps them, by full name."""
    state: dict[str, Tensor] = layer.state_dict()
    return {
        source.family.linear_name(index, name): v.bfloat16() if v.is_floating_point() else v
        for name, v in state.items()
    }


@torch.no_grad()
def verify(folder: Path, source: Source, before: LayerInput, after: Tensor) -> None:
    """Read a checkpoint back, run it layer by layer, and compare bit for bit.

    Args:
        folder: the checkpoint.
        source: what it was made from.
        before: what the first layer gets.
        after: what the quantized layers in memory made of it.

    Raises:
        VerificationError: one number differs, of the layers' outputs or of the other tensors.
    """
    contents = read_checkpoint(folder)
    hidden = before.hidden
    for layer in restored_layers(contents, str(folder), source.family, source.device):
        output = layer(hidden, **before.arguments)
        hidden = output[0] if isinstance(output, tuple) else output  # older transformers
    _require_equal("numbers behind the last layer", after, hidden)
    for name in outside_layers(source):
        for rows, expected in stored_parts(source, name):
            found = contents.weights.tensor(name, rows)
            _require_equal(f"numbers of {name}", expected, found)


def _require_equal(what: str, expected: Tensor, found: Tensor) -> None:
    if torch.equal(expected, found):
        return
    wrong = int((expected != found).sum())
    worst = (expected.double() - found.double()).abs().max().item()
    raise VerificationError(
        asked="a checkpoint that computes what the quantized model in memory computes",
        found=f"{wrong} of {expected.numel()} {what} differ, by up to {worst:.3e}",
        why="the same codes, scales and transforms on the same device give the same bits",
        todo="this is a defect of mxtorq or of this machine's memory or disk: run again, and "
        "report it if it stays. Nothing was left behind",
    )
