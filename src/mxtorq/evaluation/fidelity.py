"""How far quantized outputs are from the originals on the same inputs: of linears, of layers.

An error is relative and squared, sum ||y - y_q||^2 / sum ||y||^2; minus ten times its logarithm is
the signal to quantization noise ratio in decibels. `output_error` is that of single linears under
one input, which does not know what went wrong before. `ResidualErrors` follows the residual stream
of two whole models through the same text, so that errors of earlier layers are in it.

The price: behind each layer a batch's hidden states of the reference wait for those of the model.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@torch.no_grad()
def output_error(
    triples: Iterable[tuple[Float[Tensor, "_ d"], nn.Linear, nn.Module]],
) -> float:
    """sum ||y - y_q||^2 / sum ||y||^2 over (inputs, original linear, quantized one).

    Biases cancel in the numerator and are left out of the denominator. 0.0 where y is zero.
    """
    wrong = power = 0.0
    for inputs, original, quantized in triples:
        plain = nn.functional.linear(inputs, original.weight.to(inputs.dtype))
        bias = 0.0 if original.bias is None else original.bias
        wrong += (quantized(inputs) - bias - plain).double().square().sum().item()
        power += plain.double().square().sum().item()
    return wrong / power if power else 0.0


class ResidualErrors:
    """Compares what each decoder layer hands on, in two models that get the same batches.

    While its ``with`` block lasts, every forward pass of the reference has to be followed by one of
    the model with the same tokens.
    """

    def __init__(self, model: nn.Module, reference: nn.Module, layers: str) -> None:
        """Args:
        model: what is compared.
        reference: what it is compared with; another object.
        layers: where both hold their decoder layers.
        """
        self._names = [
            f"{layers}.{name}" for name, _ in model.get_submodule(layers).named_children()
        ]
        self._pairs = list(
            zip(
                model.get_submodule(layers).children(),
                reference.get_submodule(layers).children(),
                strict=True,
            )
        )
        self._wrong = [0.0] * len(self._pairs)
        self._power = [0.0] * len(self._pairs)
        self._waiting: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "ResidualErrors":
        for index, (layer, original) in enumerate(self._pairs):
            self._hooks.append(original.register_forward_hook(self._keeper(index)))
            self._hooks.append(layer.register_forward_hook(self._comparer(index)))
        return self

    def __exit__(self, *raised: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._waiting.clear()

    def by_layer(self) -> dict[str, float]:
        """sum ||y - y_q||^2 / sum ||y||^2 over everything that passed, by the layer's name."""
        figures = zip(self._names, self._wrong, self._power, strict=True)
        return {name: wrong / power if power else 0.0 for name, wrong, power in figures}

    def _keeper(self, index: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._waiting[index] = _hidden(output)

        return keep

    def _comparer(self, index: int) -> Any:
        def compare(module: nn.Module, args: Any, output: Any) -> None:
            plain = self._waiting.pop(index).double()
            self._wrong[index] += (_hidden(output).double() - plain).square().sum().item()
            self._power[index] += plain.square().sum().item()

        return compare


def same_stream(model: nn.Module, reference: nn.Module, embedding: str) -> bool:
    """Whether two models' residual streams have the same coordinates: their embeddings are equal.

    A method that merges a rotation into the stream changes the embedding with it, and comparing its
    stream with the original's would say nothing.
    """
    weights: list[Any] = [each.get_submodule(embedding).weight for each in (model, reference)]
    return weights[0].shape == weights[1].shape and bool(torch.equal(*weights))


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output  # older transformers
    return hidden
