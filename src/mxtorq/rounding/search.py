"""Which of three exponents a group takes: by its weights' errors, or by those of the outputs.

`exponents` compares the rule's exponent e with e - 1 and e + 1 by the squared error of the 32
weights, each rounded for itself and all counted alike. That is not what GPTQ leaves: inside of the
group errors are handed on too, and columns differ in what they are worth. So ``outputs`` rounds the
group under each of the three, with compensation, and compares what is added to the goal,

    sum over the group's k of  R_kk^2 (e_k + sum_{i<k} e_i R_ik / R_kk)^2

(`factor`; over all groups these sums are the damped goal of the row). As GPTQ is, it is greedy:
what a choice does to later groups is not looked at. The idea, the loss of GPTQ itself as the
measure of a scale, is decided here; scale searches of released codes are by errors of weights.

A tie goes to the rule's own exponent, and an exponent whose sum is not finite is taken by none.
Errors are float32 numbers as GPTQ has them; squares, weights and sums are float64, in one fixed
order. Price: the inner step thrice, and three products with 32 x 32 matrices.
"""

from enum import StrEnum

import torch
from jaxtyping import Float32, Float64, UInt8
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.kernels.dispatch import Backend
from mxtorq.rounding.exponents import candidates
from mxtorq.rounding.factor import Factor
from mxtorq.rounding.group import fix_group_


class Search(StrEnum):
    """By what the exponents that are tried for a group are compared."""

    VALUES = "values"
    OUTPUTS = "outputs"


def require_search(search: Search, exponents: int, *, dynamic: bool) -> None:
    """Refuse to compare outputs where there is nothing to compare, or not yet.

    Raises:
        UsageError: one exponent, or scales that are chosen beforehand.
    """
    if search is Search.VALUES:
        return
    if exponents == 1:
        raise UsageError(
            asked=f"search={search} with exponents={exponents}",
            found="one exponent for each group",
            why="a search compares the rule's exponent with its two neighbours",
            todo="pass exponents=3, or leave search out",
        )
    if not dynamic:
        raise UsageError(
            asked=f"search={search} with scales=static",
            found="scales that are chosen before any column is rounded",
            why="what a scale does to the outputs depends on the errors of earlier columns, which "
            "are not known then",
            todo="pass scales=dynamic, or search=values",
        )


def fix_by_outputs_(
    columns: Float32[Tensor, "32 rows"],
    free: Float32[Tensor, "32 rows"],
    moves: Float32[Tensor, "32 rows"],
    factor: Factor,
    here: slice,
    scales: Float32[Tensor, "blocks rows"],
    group: int,
    rule: ScaleRule,
    backend: Backend | str = Backend.AUTO,
) -> UInt8[Tensor, "32 rows"]:
    """`group.fix_group_` under the best of three exponents for each row.

    Args:
        columns: the group's weights with all compensation so far; become the chosen values.
        free: the same weights as they came.
        moves: of each column by the errors of all groups before.
        factor: of the damped Hessian.
        here: the group's columns in the order of rounding.
        scales: of all groups.
        group: whose row of ``scales`` is written.
        rule: proposes an exponent from the columns as they come.
        backend: who computes the inner step.
    """
    groups, follow = [group] * len(columns), factor.follow[here.start // len(columns)]
    start, pull = columns.clone(), factor.pull[here, here]
    worth = factor.pivots[here].square()[:, None]

    def attempt(
        scale: Float32[Tensor, " rows"],
    ) -> tuple[Float32[Tensor, "32 rows"], UInt8[Tensor, "32 rows"], Float64[Tensor, " rows"]]:
        values, scales[group] = start.clone(), scale
        codes = fix_group_(values, follow, scales, groups, None, backend)
        outputs = torch.addmm(moves, pull, free - values)
        return values, codes, _sum(outputs.double().square_().mul_(worth))

    best, *others = candidates(columns.T.contiguous(), rule)
    chosen, codes, least = attempt(best)
    for scale in others:
        values, found, loss = attempt(scale)
        better = loss < least
        chosen, codes = torch.where(better, values, chosen), torch.where(better, found, codes)
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    columns.copy_(chosen)
    scales[group] = best
    return codes


def _sum(squares: Float64[Tensor, "32 rows"]) -> Float64[Tensor, " rows"]:
    """Halves onto halves; Inf where it is not finite."""
    while len(squares) > 1:
        half = len(squares) // 2
        squares = squares[:half] + squares[half:]
    return squares[0].nan_to_num(nan=torch.inf, posinf=torch.inf)
