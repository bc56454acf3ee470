"""The layers that take a linear's place: transformed, and transformed and quantized.

`TransformedLinear` only changes coordinates, y = (x T) (W T^-T)^T: it is how tests see that a
transform keeps the function. `MXFP4Linear` holds the packed weight, transforms its input online,
quantizes it dynamically per token and block, and multiplies the two dequantized operands. Their
elements are exact in BF16 and their products in FP32, so this equals what an MXFP4 matrix unit
computes up to the order of the FP32 sum and the output's rounding. `NonOCPLinear` does the same
under scales that no matrix unit has: it can be evaluated and not be exported.
"""

from typing import Any

from jaxtyping import Float, Float64
from torch import Tensor, nn

from mxtorq.errors import ModelError
from mxtorq.formats import scales
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, dequantize, fake_quantize
from mxtorq.formats.scales import NonOCPScale, ScaledE2M1
from mxtorq.transforms.base import Transform


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
    product runs in the input's dtype.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: MXFP4, bias: Tensor | None, transform: Transform, rule: ScaleRule
    ) -> None:
        """Args:
        weight: the codes of W T^-T, [d_out, d].
        bias: as the linear had it, or None.
        transform: T, applied to the input.
        rule: the scale rule of the activations.
        """
        super().__init__()
        self.register_buffer("weight_packed", weight.packed)
        self.register_buffer("weight_scale", weight.e8m0)
        self.register_buffer("bias", bias)
        self.transform = transform
        self.rule = rule

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
        activations = fake_quantize(self.transform.apply(inputs.float()), self.rule)
        weight = dequantize(self.weight_mxfp4, inputs.dtype)
        return nn.functional.linear(activations.to(inputs.dtype), weight, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "MXFP4Linear":
        # A transform is a float64 value, not a buffer: `.to(dtype)` must not round it.
        super()._apply(fn, recurse)
        self.transform = self.transform.to(self.weight_packed.device)
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

    def __init__(
        self, weight: ScaledE2M1, bias: Tensor | None, transform: Transform, scale: NonOCPScale
    ) -> None:
        super().__init__()
        self.register_buffer("weight", scales.dequantize(weight))
        self.register_buffer("bias", bias)
        self.transform = transform
        self.scale = scale

    def forward(self, inputs: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d_out"]:
        activations = scales.fake_quantize(self.transform.apply(inputs.float()), self.scale)
        weight = self.weight.to(inputs.dtype)
        return nn.functional.linear(activations.to(inputs.dtype), weight, self.bias)


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
