"""Run a model layer by layer and record what reaches each input site.

The model's own forward pass is stopped at its first decoder layer, which yields the arguments that
every layer takes (positions, masks); from there each layer is called by itself. So one layer at a
time needs to be at hand, and the output of the *quantized* layer can feed the next.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mxtorq.calibration.statistics import SiteAccumulator
from mxtorq.models.family import Family, Site
from mxtorq.transforms.base import SiteStatistics

BATCH_TOKENS = 4096
"""Tokens a forward pass works on, at least one window."""


@dataclass(eq=False)
class LayerInput:
    """The hidden states of one batch of windows and the other arguments of a layer call."""

    hidden: Float[Tensor, "windows seqlen d"]
    arguments: dict[str, Any]


class _Stop(Exception):
    """Ends a forward pass once the first layer's arguments are known."""


def batches(windows: Int64[Tensor, "n seqlen"]) -> list[Int64[Tensor, "b seqlen"]]:
    """Windows in groups of about `BATCH_TOKENS` tokens."""
    return list(windows.split(max(1, BATCH_TOKENS // windows.shape[1])))


@torch.no_grad()
def first_layer_inputs(
    model: nn.Module, family: Family, windows: Int64[Tensor, "n seqlen"]
) -> list[LayerInput]:
    """What the first decoder layer receives for each batch of windows."""
    first = model.get_submodule(f"{family.layers}.0")
    device = next(model.parameters()).device
    caught: list[LayerInput] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(LayerInput(args[0], kwargs))
        raise _Stop

    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches(windows):
            try:
                model(input_ids=batch.to(device), use_cache=False)
            except _Stop:
                continue
    finally:
        hook.remove()
    return caught


@torch.no_grad()
def capture_sites(
    layer: nn.Module, sites: dict[str, Site], inputs: list[LayerInput], seed: int
) -> dict[str, SiteStatistics]:
    """Run a layer over all inputs and sum up what reaches each site.

    Args:
        layer: the decoder layer, unquantized.
        sites: the sites to record, by full name.
        inputs: the layer's inputs; left as they are.
        seed: of the token sample, the same tokens at every site.

    Raises:
        ModelError: an activation is NaN or Inf.
    """
    tokens = sum(item.hidden.shape[:-1].numel() for item in inputs)
    accumulators = {
        name: SiteAccumulator(name, _width(layer, site), tokens, seed)
        for name, site in sites.items()
    }
    with _recording(layer, sites, accumulators):
        for item in inputs:
            layer(item.hidden, **item.arguments)
    return {name: accumulator.finish() for name, accumulator in accumulators.items()}


@torch.no_grad()
def advance_(layer: nn.Module, inputs: list[LayerInput]) -> None:
    """Replace each input's hidden states by the layer's output."""
    for item in inputs:
        output = layer(item.hidden, **item.arguments)
        item.hidden = output[0] if isinstance(output, tuple) else output  # older transformers


def _width(layer: nn.Module, site: Site) -> int:
    weight = layer.get_submodule(site.linears[0]).weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]


@contextmanager
def _recording(
    layer: nn.Module, sites: dict[str, Site], accumulators: dict[str, SiteAccumulator]
) -> Iterator[None]:
    def recorder(accumulator: SiteAccumulator) -> Any:
        return lambda module, args: accumulator.add(args[0])

    hooks = [
        layer.get_submodule(site.linears[0]).register_forward_pre_hook(recorder(accumulators[name]))
        for name, site in sites.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
