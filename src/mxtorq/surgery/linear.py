"""The layers that take a linear's place: transformed, and transformed and quantized.

`TransformedLinear` only changes coordinates, y = (x T) (W T^-T)^T: it is how tests see that a
transform keeps the function. `MXFP4Linear` holds the packed weight, transforms its input online,
quantizes it dynamically per token and block, and multiplies the two dequantized operands. Their
elements are exact in BF16 and their products in FP32, so this equals what an MXFP4 matrix unit
computes up to the order of the FP32 sum and the output's rounding. `NonOCPLinear` does the same
under scales that no matrix unit has: it can be evaluated and not be exported. `StoredLinear` is not
changed yet: it waits in BF16.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn

from mxtorq.errors import ModelError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import Scale, ScaledE2M1
from mxtorq.kernels.dispatch import dequantize, multiplies_packed, multiply_packed
from mxtorq.machine import free_memory
from mxtorq.surgery.site_input import SiteInput
from mxtorq.transforms.base import Transform

_ROWS = 512  # of a weight that are fused together


class StoredLinear(nn.Linear):
    """A linear with its weight in BF16, as it is stored, under inputs in float32.

    The weight is widened for each call, so the result has the bits of a float32 linear. What writes
    to the weight calls `widen_` first: a product is no BF16 number.
    """

    @classmethod
    def like(cls, linear: nn.Linear) -> "StoredLinear":
        """One of the same shape, on ``meta``."""
        bias = linear.bias is not None
        return cls(linear.in_features, linear.out_features, bias, device="meta")

    def forward(self, input: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d_out"]:
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)

    def widen_(self) -> None:
        """Hold the weight in float32 from here on."""
        self.weight = nn.Parameter(self.weight.detach().float(), requires_grad=False)


class TransformedLinear(nn.Module):
    """A linear in transformed coordinates, unquantized, in the dtype of its weight."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: Transform) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.transform = transform

    @property
    def in_features(self) -> int:
        return self.transform.width

    def forward(self, inputs: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d_out"]:
        return nn.functional.linear(self.transform.apply(inputs), self.weight, self.bias)


class MXFP4Linear(nn.Module):
    """A linear with MXFP4 weights and activations (W4A4), emulated on any device.

    The transform and the rounding of activations run in float32 whatever the input's dtype is; the
    product runs in the input's dtype. The weight is dequantized for each call unless
    ``keeps_weight`` is set (`keep_weights_`); otherwise a few tokens on a CPU are multiplied with
    the packed weight itself.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: MXFP4,
        bias: Tensor | None,
        transform: Transform | SiteInput,
        rule: ScaleRule | None = None,
    ) -> None:
        """Args:
        weight: the codes of W T^-T, [d_out, d].
        bias: as the linear had it, or None.
        transform: T, applied to the input; or what this linear shares with others of its site.
        rule: the scale rule of the activations, for a T of its own.
        """
        super().__init__()
        self.register_buffer("weight_packed", weight.packed)
        self.register_buffer("weight_scale", weight.e8m0)
        self.register_buffer("bias", bias)
        self.input = (
            transform
            if isinstance(transform, SiteInput)
            else SiteInput(transform, rule or ScaleRule.FLOOR)
        )
        self.keeps_weight = False
        self._kept: Tensor | None = None

    @property
    def transform(self) -> Transform:
        """T."""
        return self.input.transform

    @property
    def rule(self) -> Scale:
        """The scale rule of the activations."""
        return self.input.scale

    @property
    def in_features(self) -> int:
        return self.transform.width

    @property
    def out_features(self) -> int:
        return len(self.weight_packed)

    @property
    def weight_mxfp4(self) -> MXFP4:
        """The stored codes and scales."""
        return MXFP4(self.weight_packed, self.weight_scale)

    def forward(self, inputs: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d_out"]:
        activations = self.input(inputs)
        if not self.keeps_weight and multiplies_packed(activations):
            return multiply_packed(activations, self.weight_mxfp4, self.bias)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return nn.functional.linear(activations, self._weight(inputs.dtype), bias)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        if self._kept is not None and self._kept.dtype == dtype:
            return self._kept
        weight = dequantize(self.weight_mxfp4, dtype)
        if self.keeps_weight:
            self._kept = weight
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> "MXFP4Linear":
        super()._apply(fn, recurse)
        self.input.to_(self.weight_packed.device)
        self._kept = None
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, transform={self.transform.kind}, rule={self.rule}"
        )


class NonOCPLinear(nn.Module):
    """E2M1 weights and activations under scales outside of the format, for evaluation only."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: ScaledE2M1, bias: Tensor | None, input: SiteInput) -> None:
        super().__init__()
        self.register_buffer("weight", dequantize(weight))
        self.register_buffer("bias", bias)
        self.input = input

    def forward(self, inputs: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d_out"]:
        weight = self.weight.to(inputs.dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return nn.functional.linear(self.input(inputs), weight, bias)


def keep_weights_(model: nn.Module, limit: int | None = None) -> int:
    """Let MXFP4 linears keep their dequantized weights after their first call, first come.

    It costs 4 bytes a weight in float32 and 2 in bfloat16, and pays for calls of few tokens: with
    thousands of tokens dequantizing is lost in the product.

    Args:
        model: holds the linears.
        limit: bytes that may be kept; half of the memory that is free now unless given.

    Returns:
        How many bytes will be kept in the dtype of the model's floating-point parameters.
    """
    left = free_memory() // 2 if limit is None else limit
    size = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
    kept = 0
    for module in model.modules():
        if isinstance(module, MXFP4Linear):
            needed = module.in_features * module.out_features * size
            module.keeps_weight = kept + needed <= left
            kept += needed if module.keeps_weight else 0
    return kept


def round_inputs_by_(model: nn.Module, rule: ScaleRule) -> None:
    """Let MXFP4 linears choose the scales of their activations by another rule."""
    for module in model.modules():
        if isinstance(module, MXFP4Linear):
            module.input.scale = rule


def linear_at(module: nn.Module, path: str) -> nn.Linear:
    """The linear at a path below a module.

    Raises:
        ModelError: there is something else.
    """
    found = module.get_submodule(path)
    if not isinstance(found, nn.Linear):
        raise ModelError(
            asked=f"the linear {path}",
            found=type(found).__name__,
            why="only a plain nn.Linear can be replaced without changing the function",
            todo="start from an unquantized model without adapters",
        )
    return found


def fused_weight(linear: nn.Linear, transform: Transform) -> Float64[Tensor, "d_out d"]:
    """W T^-T of a linear, in float64."""
    return transform.fuse(linear.weight.detach().double())


def fused_weights(linears: Sequence[nn.Linear], transform: Transform) -> Float32[Tensor, "d_out d"]:
    """`fused_weight` of linears that read one input, one below the other, rounded to float32.

    Some rows at a time, so that float64 is a small part of it.
    """
    rows = [linear.out_features for linear in linears]
    first = linears[0].weight
    fused = torch.empty(sum(rows), transform.width, dtype=torch.float32, device=first.device)
    for linear, target in zip(linears, fused.split(rows), strict=True):
        parts = linear.weight.detach().split(_ROWS)
        for part, here in zip(parts, target.split(_ROWS), strict=True):
            here.copy_(transform.fuse(part.double()))
    return fused
