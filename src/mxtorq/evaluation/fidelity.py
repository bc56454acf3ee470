"""How far a quantized linear is from the original on the same inputs."""

from collections.abc import Iterable

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
