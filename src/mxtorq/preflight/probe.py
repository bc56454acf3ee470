"""How long a run will take: its first layer is quantized, on two batches of the calibration text.

The first batch warms up, and the second one's passes through the layer are what every other batch
will cost; all else (fitting, rounding) happens once a layer. So

    a run  =  layers x (all else + batches x passes of a batch)  +  reading back

It is the very code that a run consists of, on a copy of the layer that nobody sees afterwards, so
no bit of a result depends on it. The price is less than one layer's work. What it cannot know:
layers that take longer than the first, rotations that are learned on the whole model beforehand,
and a disk slower than the work.
"""

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mxtorq.calibration.capture import LayerInput, batches
from mxtorq.calibration.data import Windows
from mxtorq.choosing import least_batches
from mxtorq.config import Recipe
from mxtorq.loading.source import Source
from mxtorq.quantization import first_inputs, quantize_layers_

_SHORT = 60.0
"""Seconds below which a probe is made again: what was compiled or read for the first time is a
large part of it, and costs the run nothing."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What was measured."""

    once: float
    """Seconds of a layer that do not depend on the number of batches."""
    batch: float
    """Seconds of all passes of one batch through a layer."""
    forward: float
    """Seconds of one batch through a quantized layer."""

    def seconds(self, layers: int, batches: int) -> float:
        """A run over so many layers, and reading back."""
        return layers * (self.once + batches * self.batch + self.forward)


class Clocked(list[LayerInput]):
    """Batches that know how long each pass took with each of them."""

    def __init__(self, inputs: list[LayerInput], device: torch.device) -> None:
        super().__init__(inputs)
        self._device = device
        self.passes: list[list[float]] = []

    def __iter__(self) -> Iterator[LayerInput]:
        times: list[float] = []
        for item in super().__iter__():
            started = now(self._device)
            yield item
            times.append(now(self._device) - started)
        self.passes.append(times)


def measure(source: Source, recipe: Recipe, windows: Windows, unfit: Mapping[str, int]) -> Pace:
    """Quantize a copy of the first layer, and measure.

    Raises:
        MxtorqError: what the run itself would raise at its first layer.
    """
    pace, spent = _once(source, recipe, windows, unfit)
    return pace if spent > _SHORT else _once(source, recipe, windows, unfit)[0]


def with_one_layer(source: Source) -> Source:
    """The model with a copy of its first layer and no other; all else is shared with it."""
    layers = list(source.model.get_submodule(source.family.layers).children())
    shared: dict[int, Any] = {id(layer): layer for layer in layers[1:]}
    own = {id(part) for part in _tensors(layers[0])}
    shared |= {id(part): part for part in _tensors(source.model) if id(part) not in own}
    model = copy.deepcopy(source.model, shared)
    model.set_submodule(source.family.layers, nn.ModuleList([_first(model, source)]))
    return replace(source, model=model)


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _once(
    source: Source, recipe: Recipe, windows: Windows, unfit: Mapping[str, int]
) -> tuple[Pace, float]:
    first = with_one_layer(source)
    least = least_batches(recipe.method)
    some = torch.cat(batches(windows.ids, least)[:2])
    inputs = Clocked(list(first_inputs(first, some, least=least)), source.device)
    started = now(source.device)
    for _ in quantize_layers_(first, inputs, recipe, unfit, _silent):
        pass
    spent = now(source.device) - started
    passes = inputs.passes
    pace = Pace(
        once=max(0.0, spent - sum(map(sum, passes))),
        batch=sum(times[-1] for times in passes),
        forward=passes[-1][-1],
    )
    return pace, spent


def _first(model: nn.Module, source: Source) -> nn.Module:
    return next(model.get_submodule(source.family.layers).children())


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody is told about a probe."""
