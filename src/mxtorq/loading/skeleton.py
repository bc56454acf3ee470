"""A model without its weights, and the way in for them: tensor by tensor, layer by layer.

The module is built on torch's ``meta`` device, where a tensor has a shape and no memory. What
computes its own buffers (the rotary embedding) is made again outside. From there on a tensor is put
in by its full name; until then an operation on it fails, which is better than computing with noise.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mxtorq.loading.families import require_described
from mxtorq.models.family import Family
from mxtorq.reading.documents import Refusal
from mxtorq.reading.shards import Shards
from mxtorq.surgery.experts import unpack_experts_


def empty_model(config: Mapping[str, Any], family: Family) -> nn.Module:
    """The module that a config.json describes, on ``meta`` but for its rotary embedding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype")}
    described = AutoConfig.for_model(plain.pop("model_type"), **plain)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16)
    unpack_experts_(model, family.bound(described))
    rotary: Any = type(model.get_submodule(family.rotary))
    model.set_submodule(family.rotary, rotary(config=described))
    return model.eval().requires_grad_(False)


def stored_names(model: nn.Module, family: Family) -> list[str]:
    """The tensors that a checkpoint of a model has: parameters, a tied head left out."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    config: Any = model.config
    tied = f"{family.head}.weight"
    return [name for name in names if not (config.tie_word_embeddings and name == tied)]


def fill_(model: nn.Module, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
    """Give a model's parameters their values.

    Args:
        model: changed.
        names: of the parameters.
        read: gives the value for a name.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        owner.register_parameter(leaf, nn.Parameter(read(name), requires_grad=False))


def empty_(module: nn.Module) -> None:
    """Let go of a module's parameters and buffers: they are on ``meta`` afterwards."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            gone = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            part.register_parameter(name, gone)
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, buffer.to("meta"))


def model_at_rest(
    config: dict[str, Any], family: Family, shards: Shards, refuse: Refusal
) -> nn.Module:
    """A model without values whose every tensor is there to be read.

    Raises:
        MxtorqError: one is missing or has another shape.
    """
    model = empty_model(config, family)
    require_described(model, family.bound(model.config))  # before its names are looked for
    wrong = [
        name
        for name in stored_names(model, family)
        if name not in shards.entries
        or tuple(shards.entry(name).shape) != tuple(model.get_parameter(name).shape)
    ]
    if wrong:
        raise refuse(
            f"{len(wrong)} tensors missing or of another shape, such as {wrong[0]}",
            "they would be filled with random numbers",
        )
    return model
