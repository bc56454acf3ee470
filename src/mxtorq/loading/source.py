"""A Hugging Face model as something to quantize: its module, its tokenizer, its family.

Weights are rounded to BF16 on reading, to the nearest and ties to even, whatever the source stores:
BF16 is the baseline that every result is compared with, and what a checkpoint keeps of the
unquantized tensors. FP16 loses three bits of its significand and nothing of its range. FP32 loses
sixteen bits and has BF16's range, but for the last half step below 2^128, which becomes Inf and is
refused. The module computes in float32 on a CPU, where BF16 arithmetic is missing or slow, and in
BF16 on an accelerator.

Nothing is trusted: safetensors only (a pickle can run code), no remote code, every shard of a model
and every tensor that the architecture needs must be there, and none may hold NaN or Inf.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import as_file, files
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxtorq.errors import ModelError
from mxtorq.loading.families import choose_family, require_described
from mxtorq.models.family import Family
from mxtorq.surgery.experts import unpack_experts_

REFERENCE = "reference"
"""The name of the model that travels with the package."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A model to quantize or to evaluate."""

    name: str
    model: nn.Module
    tokenizer: Any
    family: Family

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fingerprint(self) -> str:
        """SHA-256 over the names and BF16 values of all weights: which model this is."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.bfloat16().cpu().contiguous().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def longest_window(self) -> int:
        """Positions that the model was made for."""
        return int(self.config.max_position_embeddings)


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is an accelerator where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Put a BF16 model where it runs, in the dtype that it computes in there.

    Never cast to BF16 here: that would round the rotary frequencies, which stay in float32.
    """
    return model.float() if device.type == "cpu" else model.to(device)


def place_around_(model: nn.Module, layers: str, device: torch.device) -> None:
    """Put everything but the decoder layers where it computes; they stay in BF16 on the CPU."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not name.startswith(f"{layers}."):
            tensor.data = _placed(tensor, device)


def staged_(layers: Sequence[nn.Module], device: torch.device) -> Iterator[nn.Module]:
    """Each layer once it lies where it computes; the next is moved and cast while it is worked on.

    A layer is moved once. Layers that are there already cost nothing.
    """

    def place_(layer: nn.Module) -> nn.Module:
        for tensor in chain(layer.parameters(), layer.buffers()):
            tensor.data = _placed(tensor, device)
        return layer

    with ThreadPoolExecutor(1, thread_name_prefix="mxtorq-layers") as mover:
        coming = mover.submit(place_, layers[0])
        for following in (*layers[1:], None):
            layer = coming.result()
            if following is not None:
                coming = mover.submit(place_, following)
            yield layer


def _placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # As in `place`: float32 on a CPU, elsewhere what it was.
    wide = device.type == "cpu" and tensor.is_floating_point()
    return tensor.data.to(device, torch.float32 if wide else tensor.dtype)


def load_source(
    name: str, device: torch.device, *, at_rest: bool = False, family: Family | None = None
) -> Source:
    """Read a model by folder, hub id, or ``reference``.

    Args:
        name: which.
        device: where it computes.
        at_rest: leave its decoder layers in BF16 on the CPU, for `staged_`.
        family: the caller's own; found by config.json otherwise.

    Raises:
        ModelError: it is missing or gated, of an unknown family, quantized already, damaged or
            incomplete, or one of its weights is NaN or Inf.
        UsageError: the caller's family has the name of another one.
    """
    if name == REFERENCE:
        with as_file(files("mxtorq.embedded") / "model") as folder:
            return _load(name, str(folder), device, at_rest, family)
    path = Path(name)
    if not path.is_dir() and (path.exists() or not _HUB_ID.fullmatch(name)):
        raise ModelError(
            asked=f"the model {name!r}",
            found="no such folder, and no name of the form organisation/model",
            why="a model is a folder with config.json and *.safetensors, or a hub id",
            todo=f"check the path, or use {REFERENCE!r} for the model inside this package",
        )
    return _load(name, name, device, at_rest, family)


def _load(name: str, where: str, device: torch.device, at_rest: bool, own: Family | None) -> Source:
    config = _read_config(name, where)
    family = choose_family(config, own)
    _require_supported(name, config)
    _require_shards(name, Path(where))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=torch.bfloat16,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # transformers, hub and safetensors share no root
        raise _unreadable(name, error) from error
    model, report = loaded
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:
        raise ModelError(
            asked=f"the model {name!r}",
            found=f"{len(missing)} tensors missing or of another shape, such as {missing[0]}",
            why="they would be filled with random numbers",
            todo="download the model again; every shard that its index names must be there",
        )
    family = family.bound(model.config)
    unpack_experts_(model, family)
    require_described(model, family)
    _require_finite(name, model)
    model.eval().requires_grad_(False)
    if at_rest:
        place_around_(model, family.layers, device)
    else:
        model = place(model, device)
    return Source(name=name, model=model, tokenizer=tokenizer, family=family)


def _read_config(name: str, where: str) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(where, "config.json")
        config = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except Exception as error:  # as above
        raise _unreadable(name, error) from error
    if not isinstance(config, dict):
        raise _unreadable(name, TypeError("config.json holds no JSON object"))
    return config


def _require_supported(name: str, config: dict[str, Any]) -> None:
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method")
        raise ModelError(
            asked=f"the model {name!r} unquantized",
            found=f"a checkpoint that is quantized already (quant_method {method!r})",
            why="rounding rounded weights again would add both errors",
            todo="start from the original BF16 or FP16 model; `mxtorq evaluate` reads mxtorq's "
            "own checkpoints",
        )
    from transformers import AutoConfig

    try:  # a window that is set and not used, or used and not set, is known to the class alone
        meant = AutoConfig.for_model(**config)
    except Exception as error:  # as above
        raise _unreadable(name, error) from error
    types = {*(config.get("layer_types") or ()), *(getattr(meant, "layer_types", None) or ())}
    window = None if types else getattr(meant, "sliding_window", None)
    if types - {"full_attention"} or window is not None:
        raise ModelError(
            asked=f"the model {name!r}",
            found=f"layer types {sorted(types)}" if types else f"a sliding window of {window}",
            why="calibration calls each layer with the first layer's attention mask, and "
            "perplexity counts on layers that attend to everything before them",
            todo="use a model without sliding windows; where no text will be longer than the "
            "window, full attention is the same function: set sliding_window to null in its "
            "config.json",
        )


def _require_shards(name: str, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.is_file():
        return
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(name, error) from error
    if missing:
        raise ModelError(
            asked=f"the model {name!r}",
            found=f"{len(missing)} of its {len(shards)} shards missing, such as {missing[0]}",
            why=f"{index.name} says that they hold a part of the weights",
            todo="download these files too",
        )


def _require_finite(name: str, model: nn.Module) -> None:
    for parameter, values in model.named_parameters():
        if not bool(torch.isfinite(values).all()):
            raise ModelError(
                asked=f"the model {name!r}",
                found=f"NaN or Inf in {parameter} (after rounding to BF16)",
                why="a block with one such weight would become NaN as a whole",
                todo="get an undamaged copy of the weights",
            )


def _unreadable(name: str, error: Exception) -> ModelError:
    text = str(error)
    if "gated" in text.lower() or "401" in text or "403" in text:
        todo = "accept the model's licence on its hub page and log in with `hf auth login`"
    elif Path(name).is_dir():
        todo = "the folder needs config.json, tokenizer.json and undamaged *.safetensors files"
    else:
        todo = "check the name and the network, or download the model and pass its folder"
    return ModelError(
        asked=f"the model {name!r}",
        found=f"{type(error).__name__}: {text[:500]}",
        why="its configuration, weights or tokenizer cannot be read",
        todo=todo,
    )
