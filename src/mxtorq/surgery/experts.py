"""Experts as linears of their own, under the names that checkpoints give them.

transformers keeps a layer's experts in two stacked tensors, which is fast and hides the linears
that are quantized. `unpack_experts_` puts a module in their place that computes the same from
``E.gate_proj``, ``E.up_proj`` and ``E.down_proj``. Its weights are views: nothing is copied.

An expert's linears are called once for all tokens that the router sends there. The price is a
product an expert in place of one grouped product. For whoever recorded what the list was called
with, `ExpertList.routes` says which tokens these are and `ExpertList.inner` what reaches down_proj.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mxtorq.errors import ModelError
from mxtorq.models.family import Family


class Expert(nn.Module):
    """One gated MLP."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (gate, up, down))

    def forward(self, inputs: Float[Tensor, "n d"], activation: nn.Module) -> Tensor:
        output: Tensor = self.down_proj(self.inner(activation)(inputs))
        return output

    def inner(self, activation: nn.Module) -> Callable[[Tensor], Tensor]:
        """What makes the input of ``down_proj``, with the linears that are in place now."""
        gate, up = self.gate_proj, self.up_proj
        return lambda inputs: activation(gate(inputs)) * up(inputs)


class ExpertList(nn.Module):
    """All experts of a layer, called as transformers calls the stacked ones."""

    def __init__(
        self,
        gate_up: Float[Tensor, "experts twice d"],
        down: Float[Tensor, "experts d inner"],
        activation: nn.Module,
    ) -> None:
        super().__init__()
        for index, parts in enumerate(zip(gate_up, down, strict=True)):
            self.add_module(str(index), Expert(*parts))
        self.act_fn = activation

    def forward(
        self,
        inputs: Float[Tensor, "n d"],
        chosen: Int64[Tensor, "n k"],
        weights: Float[Tensor, "n k"],
    ) -> Float[Tensor, "n d"]:
        """The sum of the outputs of each token's ``chosen`` experts, with these weights."""
        total = torch.zeros_like(inputs)
        for index, tokens, places in self.routes(chosen):
            output = self.get_submodule(str(index))(inputs[tokens], self.act_fn)
            output = output * weights[tokens, places, None]
            total.index_add_(0, tokens, output.to(total.dtype))
        return total

    def inner(self, index: int) -> Callable[[Tensor], Tensor]:
        """`Expert.inner` of one of them: it stays what it is when its linears are replaced."""
        expert: Any = self.get_submodule(str(index))
        made: Callable[[Tensor], Tensor] = expert.inner(self.act_fn)
        return made

    @staticmethod
    def routes(chosen: Int64[Tensor, "n k"]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each expert that is chosen, its tokens in their order, and its place in their choice."""
        for index in chosen.unique().tolist():
            tokens, places = (chosen == index).nonzero(as_tuple=True)
            yield index, tokens, places


def unpack_experts_(model: nn.Module, family: Family) -> None:
    """Give every expert linears of its own, if the family has experts.

    Raises:
        ModelError: a layer has none, or keeps them in another way.
    """
    if family.experts is None:
        return
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        path = family.experts.module
        stacked: Any = dict(layer.named_modules()).get(path)
        if isinstance(stacked, ExpertList):
            continue
        weights = _stacked_weights(stacked)
        if weights is None:
            raise ModelError(
                asked=f"the experts {family.linear_name(index, path)}",
                found=f"{type(stacked).__name__} without the tensors gate_up_proj [experts, 2 x "
                "inner, hidden] and down_proj [experts, hidden, inner]"
                if stacked is not None
                else "a layer without them",
                why="every layer has to have the same sites, with linears of an expert's own",
                todo="use a model with experts in every layer, and a transformers release that "
                "stacks them in this way",
            )
        layer.set_submodule(path, ExpertList(*weights, stacked.act_fn))


def _stacked_weights(stacked: Any) -> tuple[Tensor, Tensor] | None:
    gate_up, down = getattr(stacked, "gate_up_proj", None), getattr(stacked, "down_proj", None)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        return None
    fits = gate_up.dim() == down.dim() == 3
    fits = fits and tuple(gate_up.shape) == (len(down), 2 * down.shape[2], down.shape[1])
    return (gate_up, down) if fits else None


def _linear(weight: Float[Tensor, "d_out d"]) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return made
