"""What a quantized linear computes in an engine: transform, round, multiply.

It is `surgery.linear.MXFP4Linear` for an engine that keeps the weight itself and hands out tensors
without gradients. On a CPU everything runs in float32 and the result is cast: MXFP4 operands are
exact there, and BF16 products are many times slower on CPUs without instructions for them. On a
GPU the dequantized operands are multiplied in the dtype of the input, where they are exact too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.kernels.dispatch import dequantize, multiplies_packed, multiply_packed
from mxtorq.serving.vllm.shards import part_of
from mxtorq.surgery.site_input import SiteInput
from mxtorq.transforms.base import Transform

Gather = Callable[[Tensor], Tensor]
"""The channels of all ranks behind each other, on every rank."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankInput:
    """The transform and the rounding of the channels that one rank multiplies."""

    site: SiteInput
    mine: slice | None = None
    """The rank's channels among all, where all have to be gathered first."""
    gather: Gather | None = None

    def __call__(self, inputs: Float[Tensor, "*tokens d_rank"]) -> Float[Tensor, "*tokens d_rank"]:
        """The rounded values of x T, computed in float32, in the dtype of ``inputs``."""
        if self.gather is None or self.mine is None:
            return self.site(inputs)
        whole = self.gather(inputs).contiguous()
        return self.site(whole)[..., self.mine].contiguous()


def rank_input(
    transform: Transform,
    rule: ScaleRule,
    device: torch.device,
    mine: slice | None = None,
    gather: Gather | None = None,
) -> RankInput:
    """What a rank does with its channels: alone if the transform allows it.

    Otherwise it gathers the channels of all ranks, which moves d numbers a token and lets every
    rank transform all of them.

    Args:
        transform: of the whole site.
        rule: the scale rule of activations.
        device: where it computes.
        mine: the rank's channels; all of them unless given.
        gather: needed where ``mine`` is given.
    """
    part = transform if mine is None else part_of(transform, mine.start, mine.stop)
    site = SiteInput(transform if part is None else part, rule)
    site.to_(device)
    alone = part is not None
    return RankInput(site=site) if alone else RankInput(site=site, mine=mine, gather=gather)


def multiply(
    rounded: RankInput | SiteInput,
    inputs: Float[Tensor, "*tokens d"],
    weight: MXFP4,
    bias: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "*tokens d_out"]:
    """y = Q(x T) W^T + b in the dtype of ``inputs``; W is stored as the codes of W T^-T."""
    if inputs.device.type != "cpu":
        return torch.nn.functional.linear(rounded(inputs), dequantize(weight, inputs.dtype), bias)
    values = rounded(inputs.float())
    added = None if bias is None else bias.float()
    if multiplies_packed(values):
        result = multiply_packed(values, weight, added)
    else:
        result = torch.nn.functional.linear(values, dequantize(weight), added)
    return result.to(inputs.dtype)
