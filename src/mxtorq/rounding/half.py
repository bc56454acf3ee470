"""A symmetric matrix as its upper triangle: half of the memory, for what is seldom needed whole.

GPTQ overwrites the Hessian with its factor, and asks for the Hessian itself once more where bounds
leave open which of two roundings of a row is better. Meanwhile it is kept here: panels of rows,
each from its first diagonal entry on (to 1.05 d^2 / 2 numbers at d = 14336).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.transforms.congruence import panels


class Half(NamedTuple):
    """Made by `halve`."""

    parts: tuple[Tensor, ...]
    """The rows of each panel, from its diagonal on."""

    def whole(self) -> Float[Tensor, "d d"]:
        """The matrix again."""
        width = self.parts[0].shape[1]
        matrix = self.parts[0].new_empty(width, width)
        for panel, part in zip(panels(width), self.parts, strict=True):
            matrix[panel, panel.start :] = part
            matrix[panel.start :, panel] = part.T
        return matrix

    def diagonal(self) -> Float[Tensor, " d"]:
        """The matrix's."""
        return torch.cat([part.diagonal() for part in self.parts])

    def products(
        self, left: Float64[Tensor, "rows d"], right: Float64[Tensor, "rows d"]
    ) -> Float64[Tensor, " rows"]:
        """l M r^T for each pair of rows l and r."""
        total = left.new_zeros(len(left))
        for panel, part in zip(panels(left.shape[1]), self.parts, strict=True):
            total += ((left[:, panel] @ part) * right[:, panel.start :]).sum(1)
            beyond = part[:, len(part) :]
            total += ((right[:, panel] @ beyond) * left[:, panel.stop :]).sum(1)
        return total


def halve(matrix: Float[Tensor, "d d"]) -> Half:
    """Of a matrix that is symmetric but for rounding: the mean of it and its transpose, which is
    the same quadratic form, and the same bits where it is symmetric."""
    parts = []
    for panel in panels(len(matrix)):
        part = matrix[panel, panel.start :] + matrix[panel.start :, panel].T
        parts.append(part.mul_(0.5))
    return Half(tuple(parts))
