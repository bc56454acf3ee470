"""What a transform is, what a method may see, and what a method is.

A transform is an invertible map T of the feature axis. It changes a linear layer's input online,
x' = x T, and its weight offline, W' = W T^-T, so that x' W'^T = x W^T: the function is kept, and
what is rounded is better behaved. Row vectors everywhere. Transforms are immutable values that
hold float64 tensors; they compute in the dtype of what they are applied to.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.scales import Scale
from mxtorq.formats.spec import BLOCK
from mxtorq.models.family import SiteName
from mxtorq.transforms.congruence import congruence_


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """What a method needs that chooses among transforms by what they lose once all is rounded."""

    held_out: Float32[Tensor, "sampled d"]
    """Inputs of calibration tokens behind nothing else that a method may see."""
    gradients: Float32[Tensor, "rows d"]
    """g of the layer's output along random directions, with respect to the site's input: an error e
    of an input changes that output by E (e g^T)^2 in the mean square (`calibration.gradients`)."""
    held_out_gradients: Float32[Tensor, "others d"]
    """Likewise of tokens that are held out: what is fitted to the former is judged by these."""
    output_weights: Float64[Tensor, " d_out"]
    """The mean square of the same gradients with respect to each output of the site's linears: what
    an error there is worth."""
    activations: Scale
    """By which inputs will be rounded."""
    corrected: bool
    """Whether weights will be corrected for what the rounding of inputs does in the mean."""
    rounded: Callable[[Float32[Tensor, "rows d"], Callable[[], Tensor]], Tensor]
    """Weights as the run will round them; the second argument gives the second moment of their
    inputs to a rounding that asks for it."""
    runs: Callable[["Transform"], bool]
    """Whether the target runs a transform."""
    stock: Callable[["Transform"], bool]
    """Whether engines run it without mxtorq."""
    multiply_adds: Callable[["Transform"], int] = lambda transform: transform.multiply_adds
    """What it costs for one token: less than all of it where a diagonal will be merged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteStatistics:
    """What calibration tells a method about one input site (all linears there share the input)."""

    site: str
    """Its full name, ``model.layers.3.down_in``."""
    name: SiteName
    """Which of a layer's inputs it is."""
    tokens: int
    """Calibration tokens behind ``second_moment`` and ``amax``."""
    second_moment: Float64[Tensor, "d d"] | None
    """X^T X / tokens, uncentred; None where neither method nor rounding needs it, for summing it
    takes longer than all the rest of a calibration."""
    amax: Float32[Tensor, " d"]
    """The largest magnitude of each channel over all tokens."""
    sample: Float32[Tensor, "sampled d"]
    """Some of the tokens' inputs, drawn uniformly without replacement, in the order of the text."""
    weights: tuple[Float[Tensor, "_ d"], ...]
    """The weight of each linear that reads the site, in the dtype in which the model holds it."""
    judgement: Judgement | None = None
    """For a method that `chooses`."""

    @property
    def width(self) -> int:
        return len(self.amax)

    @property
    def hessian(self) -> Float64[Tensor, "d d"]:
        """The second moment.

        Raises:
            UsageError: it was not summed up.
        """
        if self.second_moment is None:
            raise UsageError(
                asked=f"the second moment of {self.site}",
                found="statistics without it",
                why="method and rounding said that they do not need it (`needs_hessian`)",
                todo="leave `needs_hessian` of the method True",
            )
        return self.second_moment

    @property
    def weight(self) -> Float64[Tensor, "d_out d"]:
        """The weights stacked: q, k and v, or gate and up, are one matrix to a method.

        Made anew for each that asks: it takes four times the memory of a model in BF16.
        """
        return torch.cat([weight.double() for weight in self.weights])

    def rescaled(
        self, factors: Float64[Tensor, " d"], *, overwrite: bool = False
    ) -> "SiteStatistics":
        """The statistics of the same inputs, channel c multiplied with ``factors[c]``.

        ``weights`` stay: whoever rescales the inputs knows what became of them. With ``overwrite``
        the second moment is rescaled where it is, and these statistics must not be used any more.
        """
        moment = self.second_moment
        if moment is not None:
            moment = (moment if overwrite else moment.clone()).mul_(factors[:, None]).mul_(factors)
        return replace(
            self,
            second_moment=moment,
            amax=self.amax * factors.float(),
            sample=self.sample * factors.float(),
        )

    def transformed_hessian(
        self, transform: "Transform", *, overwrite: bool = False
    ) -> Float64[Tensor, "d d"]:
        """The second moment of x T: T^T H T.

        With ``overwrite`` it is made where H is, and these statistics must not be used any more.
        """
        moment = self.hessian if overwrite else self.hessian.clone()
        congruence_(moment, transform.apply)
        return moment

    def transformed(self, transform: "Transform") -> "SiteStatistics":
        """The statistics of x T and W T^-T.

        ``amax`` becomes that of the sample: the extremes of other tokens are not known any more.
        """
        sample = transform.apply(self.sample)
        return replace(
            self,
            second_moment=None
            if self.second_moment is None
            else self.transformed_hessian(transform),
            amax=sample.abs().amax(0),
            sample=sample,
            weights=tuple(transform.fuse(weight.double()) for weight in self.weights),
        )

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

    def online(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        """What an engine computes for x T: `apply`, unless its rounding belongs to the map."""
        return self.apply(values)

    @property
    def exact_online(self) -> bool:
        """Whether `online` is `apply`."""
        return type(self).online is Transform.online

    @abstractmethod
    def fuse(self, weight: Float64[Tensor, "d_out d"]) -> Float64[Tensor, "d_out d"]:
        """Offline: W T^-T in float64."""

    def split_blocks(self) -> "tuple[Transform | None, Float64[Tensor, 'm 32 32'] | None]":
        """(rest, matrices): the same map as rest followed by a product within each MX block.

        Kernels fuse that product with the rounding that comes after it. ``matrices`` are one for
        all blocks or one for each; None stands for no work.
        """
        return self, None

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
        """The same map on another device; itself where it is there already."""
        parts = self.tensors()
        if all(tensor.device == device for tensor in parts.values()):
            return self
        moved = {name: tensor.to(device) for name, tensor in parts.items()}
        return type(self).from_tensors(self.width, moved)

    def matrix(self) -> Float64[Tensor, "d d"]:
        """T as one dense matrix: for tests and for pictures, never for the hot path."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))


class Rotation(Transform):
    """A transform that is orthogonal, so that T^-T = T and weights take the same map as inputs."""

    def fuse(self, weight: Float64[Tensor, "d_out d"]) -> Float64[Tensor, "d_out d"]:
        return self.apply(weight)


class NetworkShape(NamedTuple):
    """The sizes of a decoder that a method may have to refuse."""

    hidden: int
    """Features of the residual stream."""
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    sites: Mapping[SiteName, int]
    """The width of each site that is quantized."""


class OfflineRotations(NamedTuple):
    """Rotations that are merged into weights before anything is quantized; free at run time."""

    residual: Rotation | None = None
    """R1, of the residual stream: its writers' outputs and its readers' inputs."""
    heads: tuple[Rotation, ...] = ()
    """R2 of each layer, of head_dim features: v_proj's outputs and o_proj's inputs, each head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """What a method may see of the whole model before the layers are quantized one by one."""

    shape: NetworkShape
    windows: int
    """How many calibration windows there are."""
    loss: Callable[[Tensor, list[Tensor], Mapping[SiteName, Transform], list[int]], Tensor]
    """``loss(residual, heads, online, windows)``: the mean negative log-likelihood of some
    calibration windows when matrices R1 [hidden, hidden] and R2 [head_dim, head_dim] a layer are
    merged, sites have ``online`` transforms, and the inputs of the linears are rounded to MXFP4
    (straight-through gradient). Differentiable in the matrices."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """(steps done, steps in all) of a method that takes long."""


class Choice(NamedTuple):
    """What a method chose for a site."""

    transform: Transform
    name: str
    """Of the candidate."""
    losses: Mapping[str, float]
    """What candidates lose, by name."""
    at_least: Mapping[str, float]
    """Likewise of candidates that were ruled out by what they lose at least."""


class TransformMethod(ABC):
    """How transforms are chosen. Subclasses are frozen dataclasses of options.

    `fit` is what every method has. The others matter to few and do nothing here.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    needs_hessian: ClassVar[bool] = True
    """Whether `fit` reads the second moment of the inputs."""

    needs_weights: ClassVar[bool] = True
    """Whether `fit` reads the weights; a forecast of memory counts them."""

    chooses: ClassVar[bool] = False
    """Whether it chooses among transforms: it reads `SiteStatistics.judgement`, and has `choose`,
    which says what was chosen and why."""

    usual_rounding: ClassVar[str] = "rtn"
    """How weights are rounded where a recipe does not say: what the method is made for."""

    @property
    def needs_compensation(self) -> bool:
        """Whether its transforms only make sense when rounding makes good for its own errors."""
        return False

    @abstractmethod
    def fit(self, statistics: SiteStatistics, seed: int) -> Transform:
        """Choose a site's transform: a function of options, statistics and seed alone."""

    def choose(self, statistics: SiteStatistics, seed: int) -> "Choice":
        """As `fit`, with what was compared. Every method that `chooses` has its own."""
        raise NotImplementedError

    def check(self, shape: NetworkShape) -> None:
        """Refuse a network that the method cannot serve, before any work.

        Raises:
            UsageError: with what would work.
        """

    @property
    def rotates(self) -> bool:
        """Whether `rotations` chooses any; if so the whole model has to be in memory for it."""
        return type(self).rotations is not TransformMethod.rotations

    def rotations(self, network: Network, seed: int) -> OfflineRotations:
        """Choose what is merged into the weights of the whole model before sites are fitted."""
        return OfflineRotations()
