"""Hadamard matrices of many sizes, and block-Hadamard, the data-free baseline to beat.

A Hadamard matrix has entries 1 and -1 and orthogonal rows; divided by the root of its size it is a
rotation that spreads every coordinate over all others equally. Sylvester's construction doubles:
sizes 2^k. Paley's uses which numbers are squares modulo a prime q: size q + 1 for q = 3 mod 4 (I)
and 2 (q + 1) for q = 1 mod 4 (II). Kronecker products of Hadamard matrices are Hadamard, and cheap:
one of sizes n_1, n_2, ... costs d sum(n_i) (`KroneckerRotation`). `factors` finds such a product
for a width; the widths of the Llama 3 and Qwen3 families have one. Williamson's matrices (172, for
the 11008 of Llama-2-7B) and Paley's over prime powers are not built.

`Hadamard` is the block-Hadamard of MR-GPTQ (arXiv 2509.23202), on every input site, all blocks
alike; nothing is fitted and no seed enters. The paper offers the sizes 16 to 128, and its released
code defaults to 128. The default here is 32, the MX block: an outlier is then spread over the block
whose scale it sets and no other.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.base import NetworkShape, SiteStatistics, TransformMethod
from mxtorq.transforms.blocks import require_whole_blocks
from mxtorq.transforms.rotation import BlockRotation

LARGEST_SYLVESTER = 32
"""Powers of two are split into factors of at most this size."""

LARGEST_PALEY = 512
"""A larger factor costs nearly as much as a dense rotation, which is what a product avoids."""


def sylvester(size: int) -> Float64[Tensor, "n n"]:
    """The normalised Sylvester-Hadamard matrix, symmetric and orthogonal.

    Raises:
        UsageError: the size is not a power of two.
    """
    if not _power_of_two(size):
        raise UsageError(
            asked=f"a Sylvester-Hadamard matrix of size {size}",
            found="a size that is not a power of two",
            why="Sylvester's construction doubles a matrix of size 1",
            todo="choose 16, 32, 64 or 128",
        )
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def paley(size: int) -> Float64[Tensor, "n n"]:
    """The normalised Paley-Hadamard matrix, of type I where there is one and else of type II.

    Raises:
        UsageError: neither ``size - 1`` is a prime 3 mod 4 nor ``size / 2 - 1`` one 1 mod 4.
    """
    if not _is_paley(size):
        raise UsageError(
            asked=f"a Paley-Hadamard matrix of size {size}",
            found=f"{size - 1} and {size // 2 - 1}",
            why="the size is q + 1 for a prime q = 3 mod 4, or 2 (q + 1) for a prime q = 1 mod 4",
            todo="choose 12, 20, 28, 36, 44, 60, 68 or 76",
        )
    if _is_prime(size - 1):  # I + S, S skew
        core = _bordered(size - 1, -1.0)
        return (core + torch.eye(size, dtype=torch.float64)) / math.sqrt(size)
    core = _bordered(size // 2 - 1, 1.0)  # symmetric conference matrix
    eye = torch.eye(len(core), dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return (torch.kron(core, pair) + torch.kron(eye, other)) / math.sqrt(size)


def sizes(width: int) -> tuple[int, ...]:
    """The sizes of `factors`: those with the smallest sum, the Paley sizes first.

    Raises:
        UsageError: no product of known matrices has this width.
    """
    odd, twos = width, 0
    while odd > 1 and odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    found = _cheapest(odd, twos) if width > 0 else None
    if found is None:
        raise UsageError(
            asked=f"a Hadamard matrix of size {width}",
            found=f"{width} = 2^{twos} x {odd}" if width > 0 else f"{width}",
            why="it is no product of powers of two and Paley's sizes 12, 20, 28, 36, 44, ... up to "
            f"{LARGEST_PALEY}; an odd factor needs twos beside it, and some need Williamson's "
            "construction, which is not built",
            todo="rotate within blocks instead: the methods `brq` and `hadamard` need a block "
            "size that divides the width and no more",
        )
    return found


def factors(width: int) -> tuple[Float64[Tensor, "_ _"], ...]:
    """Orthogonal matrices whose Kronecker product is a normalised Hadamard matrix of ``width``.

    Raises:
        UsageError: no product of known matrices has this width.
    """
    return tuple(sylvester(n) if _power_of_two(n) else paley(n) for n in sizes(width))


@dataclass(frozen=True, kw_only=True)
class Hadamard(TransformMethod):
    """Block-Hadamard on every input site."""

    needs_hessian: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False

    size: int = BLOCK

    def __post_init__(self) -> None:
        require_power_of_two(self.size, str(self))

    def fit(self, statistics: SiteStatistics, seed: int) -> BlockRotation:
        return BlockRotation(statistics.width, sylvester(self.size))

    def check(self, shape: NetworkShape) -> None:
        require_whole_blocks("hadamard", self.size, shape.sites, "size")


def require_power_of_two(size: int, asked: str) -> None:
    """Refuse a block size that is not a power of two from 2 on.

    Raises:
        UsageError: with sizes that are.
    """
    if size < 2 or not _power_of_two(size):
        raise UsageError(
            asked=asked,
            found=f"size={size}",
            why="the blocks are Sylvester-Hadamard matrices, whose sizes are powers of two",
            todo="choose 16, 32, 64 or 128",
        )


def _power_of_two(size: int) -> bool:
    return size >= 1 and size & (size - 1) == 0


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def _is_paley(size: int) -> bool:
    first = size % 4 == 0 and _is_prime(size - 1)
    return first or (size % 4 == 0 and size // 2 % 4 == 2 and _is_prime(size // 2 - 1))


def _cheapest(odd: int, twos: int) -> tuple[int, ...] | None:
    """Sizes of the smallest sum whose product is ``odd`` 2^twos."""
    if odd == 1:
        # Equal parts, as few as the limit allows: 512 = 16 x 32.
        parts = -(-twos // (LARGEST_SYLVESTER.bit_length() - 1))
        return tuple(1 << (twos + at) // parts for at in range(parts)) if parts else ()
    best: tuple[int, ...] | None = None
    for divisor in (d for d in range(3, odd + 1, 2) if odd % d == 0):
        for power in range(2, twos + 1):
            size = divisor << power
            if size > LARGEST_PALEY or not _is_paley(size):
                continue
            rest = _cheapest(odd // divisor, twos - power)
            if rest is not None and (best is None or size + sum(rest) < sum(best)):
                best = (size, *rest)
    return best


def _bordered(prime: int, corner: float) -> Float64[Tensor, "n n"]:
    """Ones around the Jacobsthal matrix Q_ij = chi(i - j); the first column times ``corner``.

    chi is 0 for 0, 1 for squares modulo the prime and -1 for the others. The result C has a zero
    diagonal and C C^T = prime I; it is symmetric for 1 mod 4 (corner 1), skew for 3 mod 4 (-1).
    """
    chi = torch.full((prime,), -1.0, dtype=torch.float64)
    chi[torch.arange(prime).square() % prime] = 1.0
    chi[0] = 0.0
    at = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0] = 0.0
    matrix[1:, 0] = corner
    matrix[1:, 1:] = chi[(at[:, None] - at) % prime]
    return matrix
