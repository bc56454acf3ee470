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
import re
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxtorq.errors import ModelError, MxtorqError
from mxtorq.loading.families import choose_family, require_described
from mxtorq.loading.hub import OLD_NAME, not_had, quiet_client
from mxtorq.loading.skeleton import model_at_rest
from mxtorq.models.family import Family
from mxtorq.reading.configuration import read_configuration, require_plausible
from mxtorq.reading.documents import Refusal
from mxtorq.reading.shards import STEM, Shards, indexed_files, open_shards
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
    device: torch.device
    """Where it computes."""
    shards: Shards | None = None
    """What a model that stays on disk is read from: see `at_rest`. None when it is in memory."""

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def fingerprint(self) -> str:
        """SHA-256 over names and weights: which model this is.

        Of a model in memory all BF16 values count, of one on disk a sample of each stored tensor.
        """
        if self.shards is not None:
            return self.shards.sample_digest()
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


def load_source(
    name: str, device: torch.device, *, at_rest: bool = False, family: Family | None = None
) -> Source:
    """Read a model by folder, hub id, or ``reference``.

    Args:
        name: which.
        device: where it computes.
        at_rest: leave its weights on disk.
        family: the caller's own; found by config.json otherwise.

    Raises:
        ModelError: it is missing or gated, of an unknown family, quantized already, damaged or
            incomplete, or one of its weights is NaN or Inf.
        UsageError: the caller's family has the name of another one.
    """
    if name == REFERENCE:
        with as_file(files("mxtorq.embedded") / "model") as folder:
            return _load(name, str(folder), device, False, family)
    path = Path(name)
    if not path.is_dir() and (path.exists() or not _HUB_ID.fullmatch(name)):
        raise ModelError(
            asked=f"the model {name!r}",
            found="no such folder, and no name of the form organisation/model",
            why="a model is a folder with config.json and *.safetensors, or a hub id",
            todo=f"check the path, or use {REFERENCE!r} for the model inside this package",
        )
    if path.is_dir():
        return _load(name, name, device, at_rest, family)
    with quiet_client():
        return _load(name, name, device, at_rest, family)


def _load(name: str, where: str, device: torch.device, at_rest: bool, own: Family | None) -> Source:
    config = _read_config(name, where)
    family = choose_family(config, own)
    _require_supported(name, config)
    shards = _sound_shards(name, where, config)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # transformers, hub and safetensors share no root
        raise _unreadable(name, error) from error
    if at_rest:
        try:
            model = model_at_rest(config, family, shards, _refusal(name))
        except MxtorqError:
            raise
        except Exception as error:  # as above
            raise _unreadable(name, error) from error
        family = family.bound(model.config)
        require_described(model, family)
        model.get_submodule(family.rotary).to(device)
        _read_generation_config_(name, where, model)
    else:
        model = place(_whole_model(name, where, family), device)
        family = family.bound(model.config)
    return Source(
        name=name,
        model=model,
        tokenizer=tokenizer,
        family=family,
        device=device,
        shards=shards if at_rest else None,
    )


def _whole_model(name: str, where: str, family: Family) -> nn.Module:
    """The model in memory, in BF16 on the CPU."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=torch.bfloat16,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # as above
        raise _unreadable(name, error) from error
    model: nn.Module = loaded[0]
    report = loaded[1]
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
    return model.eval().requires_grad_(False)


def _read_generation_config_(name: str, where: str, model: Any) -> None:
    from transformers import GenerationConfig

    folder = Path(where)
    if folder.is_dir() and not (folder / "generation_config.json").is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(where)
    except Exception as error:  # as above
        if folder.is_dir() or not isinstance(error, OSError):  # on the hub there may be none
            raise _unreadable(name, error) from error


def _read_config(name: str, where: str) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    if Path(where).is_dir():
        return read_configuration(Path(where) / "config.json", _refusal(name))
    try:
        path = cached_file(where, "config.json")
    except Exception as error:  # as above
        raise _unreadable(name, error) from error
    return read_configuration(Path(str(path)), _refusal(name))


def _sound_shards(name: str, where: str, config: dict[str, Any]) -> Shards:
    """The weights of a model, all headers checked before memory is taken for one of them."""
    refuse = _refusal(name)
    folder = Path(where) if Path(where).is_dir() else _downloaded(name, refuse)
    if (folder / "adapter_config.json").exists():
        raise refuse(
            "adapter_config.json",
            "a folder with an adapter may draw weights from elsewhere. Merge the adapter into its "
            "model first, and pass that folder",
        )
    shards = open_shards(folder, refuse)
    require_plausible(config, len(shards.names), shards.total_bytes, refuse)
    return shards


def _downloaded(name: str, refuse: Refusal) -> Path:
    """The folder of the hub's cache with all weights of a model, in one file or by its index."""
    from transformers.utils.hub import cached_file

    try:
        try:
            return Path(str(cached_file(name, f"{STEM}.safetensors"))).parent
        except OSError:  # no such file there: it has an index then, or the network is gone
            index = Path(str(cached_file(name, f"{STEM}.safetensors.index.json")))
        for file in sorted(set(indexed_files(index, refuse).values())):
            cached_file(name, file)
    except MxtorqError:
        raise
    except Exception as error:  # as above
        raise _unreadable(name, error) from error
    return index.parent


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


def _require_finite(name: str, model: nn.Module) -> None:
    for parameter, values in model.named_parameters():
        if not bool(torch.isfinite(values).all()):
            raise ModelError(
                asked=f"the model {name!r}",
                found=f"NaN or Inf in {parameter} (after rounding to BF16)",
                why="a block with one such weight would become NaN as a whole",
                todo="get an undamaged copy of the weights",
            )


def _unreadable(name: str, error: Exception) -> MxtorqError:
    text = str(error)
    refuse = _refusal(name)
    if not Path(name).is_dir() and (found := not_had(error)):
        return refuse(found, None if "/" in name else OLD_NAME)
    if "gated" in text.lower() or "401" in text or "403" in text:
        todo = "accept the model's licence on its hub page and log in with `hf auth login`"
        refuse = replace(refuse, todo=todo)
    return refuse(f"{type(error).__name__}: {text}")


def _refusal(name: str) -> Refusal:
    if Path(name).is_dir():
        todo = "the folder needs config.json, tokenizer.json and undamaged *.safetensors files"
    else:
        todo = "check the name and the network, or download the model and pass its folder"
    return Refusal(
        kind=ModelError,
        asked=f"the model {name!r}",
        why="its configuration, weights or tokenizer cannot be read",
        todo=todo,
    )
