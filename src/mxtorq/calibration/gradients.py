"""What an error at a site does to the output of its layer: gradients through one layer.

An error e of a token's input at a site changes the layer's output h by J e + O(|e|^2). For random r
with E r^T r = I the vector g = r J has E (e g^T)^2 = |J e|^2: the gradient of the scalar <r, h>
with respect to the site's input says, in the mean square, what errors there cost. It sees what the
weights of the site alone cannot: that most of q and k does not matter where attention is sharp,
that a gate which is shut passes nothing on. r is divided by the token's root mean square of h, as
the next norm will divide: what counts is an error's part of the residual stream.

One backward pass through one layer at a time, on a few batches of the calibration text, and never
through the model. Nothing is learned from it but these second moments. Away from CPUs attention is
computed by plain products here: fused backward passes add up in an order of their own each time.
"""

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Float64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mxtorq.calibration.capture import LayerInput
from mxtorq.errors import ModelError
from mxtorq.models.family import Site
from mxtorq.ranks import SOLO, Ranks

BATCHES = 2
"""Of the calibration text, that gradients are computed for unless others are named."""


class SiteGradients(NamedTuple):
    """Of one input site."""

    rows: Float32[Tensor, "rows d"]
    """g of each token: with respect to the input that all linears of the site share."""
    output_weights: Float64[Tensor, " d_out"]
    """The mean square of the gradient of each output of the site's linears; none unless asked."""


def capture_gradients(
    layer: nn.Module,
    sites: Mapping[str, Site],
    inputs: Sequence[LayerInput],
    seed: int,
    ranks: Ranks = SOLO,
    *,
    batches: Container[int] = range(BATCHES),
    tokens: int | None = None,
    weighs_outputs: bool = True,
) -> dict[str, SiteGradients]:
    """The gradients of a layer's output along random directions, at each site.

    Args:
        layer: the decoder layer, unquantized.
        sites: by full name.
        inputs: the layer's inputs, those of this rank.
        seed: of the directions, which are those of a batch whoever computes it.
        ranks: who shares the work.
        batches: the numbers of those that count, among the batches of all ranks.
        tokens: of a batch, in whole windows and at least one; all unless given.
        weighs_outputs: whether to look at the outputs of linears too.

    Raises:
        ModelError: a gradient is NaN or Inf.
    """
    numbers = range(ranks.rank, ranks.rank + len(inputs) * ranks.size, ranks.size)
    mine = [(n, item) for n, item in zip(numbers, inputs, strict=True) if n in batches]
    rows: dict[str, list[Tensor]] = {name: [] for name in sites}
    squares: dict[str, list[Tensor]] = {name: [] for name in sites}
    heard = {name: site.linears if weighs_outputs else () for name, site in sites.items()}
    for number, item in mine:
        draw = torch.Generator().manual_seed(seed + number)
        some = item if tokens is None else item.first(tokens)
        at_inputs, at_outputs = _backward(layer, sites, heard, some, draw)
        for name in sites:
            rows[name].append(at_inputs[name])
            squares[name].append(at_outputs[name])
    found = {}
    for name in sites:
        # Ranks have one of these batches at most before any has two: theirs are in their order.
        every = torch.cat(ranks.gather(rows[name]))
        total = torch.stack(ranks.gather(squares[name])).sum(0)
        if not bool(torch.isfinite(every).all()) or not bool(torch.isfinite(total).all()):
            raise ModelError(
                asked=f"the gradients of a layer's output at {name}",
                found="NaN or Inf",
                why="what an error there costs cannot be known from them",
                todo="evaluate the unquantized model first; where it is well, pass another "
                "--calibration text, or choose a method without gradients, such as wush",
            )
        found[name] = SiteGradients(every, total / len(every))
    return found


def _backward(
    layer: nn.Module,
    sites: Mapping[str, Site],
    heard: Mapping[str, Sequence[str]],
    item: LayerInput,
    draw: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients at the inputs of each site, and the sums of their squares at the outputs of the
    linears that are ``heard`` there."""
    reached: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(
            partial(_hear, reached, path, bool(site.tap))
        )
        for site in sites.values()
        for path in site.taps
    ]
    hooks += [
        layer.get_submodule(path).register_forward_hook(partial(_see, given, path))
        for paths in heard.values()
        for path in paths
    ]
    try:
        with torch.enable_grad(), _exactly(item.hidden.device):
            start = item.hidden.detach().clone().requires_grad_(True)
            output = layer(start, **item.arguments)
            output = output[0] if isinstance(output, tuple) else output
    finally:
        for hook in hooks:
            hook.remove()
    size = output.detach().float().square().mean(-1, keepdim=True).sqrt()
    random = torch.randn(output.shape, generator=draw).to(output.device)
    probe = torch.where(size > 0, random / size, 0.0).to(output.dtype)
    found = torch.autograd.grad(output, [*reached.values(), *given.values()], probe)
    inputs = dict(zip(reached, found[: len(reached)], strict=True))
    outputs = dict(zip(given, found[len(reached) :], strict=True))
    rows, squares = {}, {}
    for name, site in sites.items():
        # An expert that no token of the batch goes to is not called.
        parts = [inputs[path].flatten(0, -2).float() for path in site.taps if path in inputs]
        rows[name] = torch.cat(parts)
        none = rows[name].new_empty(0, dtype=torch.float64)
        sums = [_squares(outputs.get(path), layer, path) for path in heard[name]]
        squares[name] = torch.cat([none, *sums])
    return rows, squares


def _exactly(device: torch.device) -> AbstractContextManager[None]:
    return nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)


def _squares(gradient: Tensor | None, layer: nn.Module, path: str) -> Float64[Tensor, " d_out"]:
    if gradient is None:
        linear: Any = layer.get_submodule(path)
        return torch.zeros(linear.out_features, dtype=torch.float64, device=linear.weight.device)
    return gradient.flatten(0, -2).double().square().sum(0)


def _hear(
    reached: dict[str, Tensor], path: str, alone: bool, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """``alone``: what else reads the input, such as a router, is no part of the site."""
    first = args[0].view_as(args[0]) if alone else args[0]
    reached[path] = first
    return (first, *args[1:])


def _see(
    given: dict[str, Tensor], path: str, module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    given[path] = output
