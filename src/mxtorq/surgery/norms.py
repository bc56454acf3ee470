"""The norms through which the residual stream is read, and the test that they are RMSNorms.

x gain / rms(x) is the only norm that rotations can pass once its gain is folded away. What a module
computes is found out by trying it: names and classes do not tell a gain of w from one of 1 + w.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mxtorq.errors import ModelError
from mxtorq.models.family import Family
from mxtorq.surgery.linear import linear_at


class StreamNorm(NamedTuple):
    """A norm of the residual stream."""

    name: str
    module: nn.Module
    readers: tuple[Tensor, ...]
    """The weights [outputs, features] of what reads its output: linears first, then routers."""


def stream_norms(model: nn.Module, family: Family) -> list[StreamNorm]:
    """Each of them, layer by layer; the final norm, which the head reads, last."""
    found = [
        StreamNorm(
            family.linear_name(index, site.source),
            layer.get_submodule(site.source),
            (
                *(linear_at(layer, path).weight for path in site.linears),
                *(_weight(layer.get_submodule(path)) for path in site.kept_readers),
            ),
        )
        for index, layer in enumerate(model.get_submodule(family.layers).children())
        for site in family.sites
        if site.reads_residual
    ]
    final = model.get_submodule(family.final_norm)
    return [*found, StreamNorm(family.final_norm, final, (linear_at(model, family.head).weight,))]


def rms_gain(norm: nn.Module) -> Float[Tensor, " d"]:
    """The gain of an RMSNorm."""
    return _weight(norm)


def require_rms_norm(norm: StreamNorm) -> None:
    """Refuse a norm that does not compute x gain / rms(x).

    Raises:
        ModelError: it has a bias, subtracts a mean, has a gain of 1 + w, or has no gain.
    """
    module, width = norm.module, norm.readers[0].shape[1]
    gain = getattr(module, "weight", None)
    found = f"{type(module).__name__} without a gain for each of {width} features"
    if isinstance(gain, Tensor) and tuple(gain.shape) == (width,):
        probe = torch.linspace(-1.0, 2.0, width, dtype=torch.float64, device=gain.device)
        expected = gain.double() * probe / probe.square().mean().sqrt()
        difference = (module(probe.to(gain.dtype)).double() - expected).abs().max()
        # A few BF16 roundings, and the epsilon under the root.
        if getattr(module, "bias", None) is None and difference <= 2**-6 * expected.abs().max():
            return
        found = f"{type(module).__name__}, which computes something else"
    raise ModelError(
        asked=f"the gain of {norm.name} folded into the linears behind it",
        found=found,
        why="only x gain / rms(x), an RMSNorm without a bias, commutes with rotations",
        todo="use a method that rotates online: `hadamard` or `torq`",
    )


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
