"""What a transform is, what a method may see, and what a method is.

A transform is an invertible map T of the feature axis. It changes a linear layer's input online,
x' = x T, and its weight offline, W' = W T^-T, so that x' W'^T = x W^T: the function is kept, and
what is rounded is better behaved. Row vectors everywhere. Transforms are immutable values that
hold float64 tensors; they compute in the dtype of what they are applied to.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from mxtorq.formats.spec import BLOCK


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteStatistics:
    """What calibration tells a method about one input site (all linears there share the input)."""

    site: str
    """Its full name, ``model.layers.3.down_in``."""
    tokens: int
    """Calibration tokens behind ``hessian``."""
    hessian: Float64[Tensor, "d d"]
    """The uncentred second moment of the inputs, X^T X / tokens."""
    sample: Float32[Tensor, "sampled d"]
    """Some of the tokens' inputs, drawn uniformly without replacement."""

    @property
    def width(self) -> int:
        return self.hessian.shape[0]

    def block_second_moment(self, block: int = BLOCK) -> Float64[Tensor, "blocks blocks"]:
        """Sigma of TORQ (section 4.1): mean over tokens and in-block positions of X_bk X_b'k.

        The partial trace of the Hessian over positions, divided by the block size.
        """
        blocks = self.width // block
        return torch.einsum("bkck->bc", self.hessian.view(blocks, block, blocks, block)) / block


class Transform(ABC):
    """An invertible map of the feature axis. Subclasses are frozen dataclasses of tensors."""

    kind: ClassVar[str]
    """The name under which checkpoints store it."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Features that it maps to as many features."""

    @abstractmethod
    def apply(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        """Online: x T for each row x, in the dtype of ``values``."""

    @abstractmethod
    def fuse(self, weight: Float64[Tensor, "d_out d"]) -> Float64[Tensor, "d_out d"]:
        """Offline: W T^-T in float64."""

    @property
    @abstractmethod
    def multiply_adds(self) -> int:
        """Multiply-adds that `apply` costs for one token."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that it is, by name."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, width: int, tensors: Mapping[str, Tensor]) -> "Transform":
        """The inverse of `tensors`. Raises `FormatError` when they do not describe one."""

    def to(self, device: torch.device) -> "Transform":
        """The same map on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return type(self).from_tensors(self.width, moved)

    def matrix(self) -> Float64[Tensor, "d d"]:
        """T as one dense matrix: for tests and for pictures, never for the hot path."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))


class Rotation(Transform):
    """A transform that is orthogonal, so that T^-T = T and weights take the same map as inputs."""

    def fuse(self, weight: Float64[Tensor, "d_out d"]) -> Float64[Tensor, "d_out d"]:
        return self.apply(weight)


@runtime_checkable
class TransformMethod(Protocol):
    """A frozen dataclass of options that chooses a transform for a site."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def fit(self, statistics: SiteStatistics, seed: int) -> Transform:
        """Choose. The result is a function of the options, the statistics and the seed alone."""
        ...
