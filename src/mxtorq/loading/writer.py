"""A quantized module into the files of a checkpoint, and the proof that they are the same.

The inverse of `loading.checkpoint`. What a checkpoint keeps beside the codes are the module's other
tensors in BF16 (they were read as BF16, so that loses nothing), tied ones once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from mxtorq.errors import VerificationError
from mxtorq.export.checkpoint import fingerprints, write_files
from mxtorq.export.compressed_tensors import quantization_config
from mxtorq.loading.checkpoint import load_checkpoint
from mxtorq.loading.source import Source
from mxtorq.models import FAMILIES
from mxtorq.transforms.base import Transform


def write_model(
    folder: Path, source: Source, transforms: Mapping[str, Transform]
) -> dict[str, dict[str, object]]:
    """Write configuration, tokenizer, tensors and transforms (by site) of a quantized model.

    Returns:
        What the manifest says of the files.

    Raises:
        OutputError: the disk has too little room.
    """
    kept = [n for n, m in source.model.named_modules() if isinstance(m, torch.nn.Linear)]
    kept += routers(source)
    rotated = any(transform.kind != "identity" for transform in transforms.values())
    config = json.loads(source.config.to_json_string())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = quantization_config(rotated=rotated, ignore=sorted(kept))
    parts = {
        f"{site}.{part}": tensor
        for site, transform in transforms.items()
        for part, tensor in transform.tensors().items()
    }
    write_files(folder, config, stored_tensors(source), parts)
    source.tokenizer.save_pretrained(folder)
    generation: Any = source.model.generation_config
    generation.save_pretrained(folder)
    return fingerprints(folder)


def routers(source: Source) -> list[str]:
    """The full names of what reads a quantized site's input and stays in BF16."""
    family = source.family
    readers = [path for site in family.sites for path in site.kept_readers]
    layers = range(len(list(source.model.get_submodule(family.layers).children())))
    return [family.linear_name(index, path) for index in layers for path in readers]


def stored_tensors(source: Source) -> dict[str, Tensor]:
    """A quantized model's tensors as a checkpoint keeps them."""
    state: dict[str, Tensor] = source.model.state_dict()
    if source.config.tie_word_embeddings:
        state.pop(f"{source.family.head}.weight", None)
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}


@torch.no_grad()
def verify(folder: Path, source: Source, windows: Int64[Tensor, "n seqlen"]) -> None:
    """Read a checkpoint back and compare its logits with the model in memory, bit for bit.

    Raises:
        VerificationError: one logit differs.
    """
    own = None if source.family.name in FAMILIES else source.family
    written = load_checkpoint(folder, source.device, own)[0].model
    ids = windows.to(source.device)
    expected = source.model(input_ids=ids, use_cache=False).logits
    found = written(input_ids=ids, use_cache=False).logits
    if not torch.equal(expected, found):
        wrong = int((expected != found).sum())
        worst = (expected.double() - found.double()).abs().max().item()
        raise VerificationError(
            asked="a checkpoint that computes what the quantized model in memory computes",
            found=f"{wrong} of {expected.numel()} logits differ, by up to {worst:.3e}",
            why="the same codes, scales and transforms on the same device give the same bits",
            todo="this is a defect of mxtorq or of this machine's memory or disk: run again, and "
            "report it if it stays. Nothing was left behind",
        )
