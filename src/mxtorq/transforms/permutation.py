"""A reordering of the channels: no arithmetic, but a gather of the whole input at run time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mxtorq.errors import FormatError
from mxtorq.transforms.base import Rotation


@dataclass(frozen=True, eq=False)
class Permutation(Rotation):
    """Channel c of the result is channel ``order[c]`` of the input."""

    kind: ClassVar[str] = "permutation"
    order: Int64[Tensor, " d"]

    def __post_init__(self) -> None:
        if not torch.equal(self.order.sort().values.cpu(), torch.arange(len(self.order))):
            raise FormatError(
                asked=f"a {self.kind}",
                found="an order that leaves a channel out or names one twice",
                why="each channel must go to exactly one place",
                todo="pass every index from 0 to d - 1 once",
            )

    @property
    def width(self) -> int:
        return len(self.order)

    def apply(self, values: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        return values.gather(-1, self.order.expand(values.shape))  # faster than an index, on CPUs

    @property
    def multiply_adds(self) -> int:
        return 0

    def tensors(self) -> dict[str, Tensor]:
        return {"order": self.order}

    @classmethod
    def from_tensors(cls, width: int, tensors: Mapping[str, Tensor]) -> "Permutation":
        return cls(tensors["order"])
