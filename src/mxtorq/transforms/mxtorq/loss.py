"""What a transform loses at a site, measured on inputs that it was not fitted to.

Both operands are really rounded, and an error counts by what it does to the layer's output, in the
mean square, as a part of what the inputs themselves do there:

    loss = E (e_x g^T)^2 / E (x g^T)^2  +  sum_r f_r E (x^ dw_r^T)^2 / E (x g^T)^2

with e_x the error of a rounded input brought back by T^-1, g the rows of the metric, dw_r the error
of row r of the rounded weight and f_r what an error of output r is worth. Tokens t and rows g are
taken independently of each other, as moments would be.

Where weights will be corrected for what rounding does to inputs in the mean (`rounding.correction`)
that part is taken out of e_x beforehand, by least squares within each MX block.

Weights are rounded by the run's own rounding, but some of them: `ROWS` rows and `COLUMNS` columns,
evenly spread, with the second moment of plain inputs in those columns. What that leaves out, errors
made good in other columns and corrections, it leaves out for all candidates.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import fake_quantize
from mxtorq.transforms.base import Judgement, SiteStatistics, Transform

ROWS = 128
COLUMNS = 1024
GRADIENTS = 512
"""Rows of the metric that errors are judged by, evenly spread."""
_RIDGE = 1e-3


class Losses:
    """What transforms of one site lose, each as a part of what its inputs do.

    The loss of the inputs alone is a lower bound of the whole loss, and cheap.
    """

    def __init__(
        self, statistics: SiteStatistics, judgement: Judgement, metric: Float[Tensor, "rows d"]
    ) -> None:
        """Args:
        statistics: of the site: its weights, and the second moment that they are rounded by.
        judgement: what transforms are judged on.
        metric: rows g; an error e of an input costs the mean of (e g^T)^2.
        """
        self._statistics, self._judgement = statistics, judgement
        self._metric = metric[evenly(len(metric), GRADIENTS).to(metric.device)].double()
        outputs = judgement.held_out @ self._metric.float().T
        self._signal = float(outputs.double().square().mean())

    def of_inputs(self, transform: Transform) -> float:
        """By the rounding of inputs."""
        values, rounded = self._operands(transform)
        errors = rounded - values
        if self._judgement.corrected:
            errors = _unexplained(errors, values)
        outputs = errors @ transform.fuse(self._metric).float().T
        return self._part(outputs.double().square().mean())

    def of_weights(self, transform: Transform) -> float:
        """By the rounding of weights."""
        worth = self._judgement.output_weights
        some = worth.nonzero().flatten()  # an expert that nobody goes to is worth nothing
        if not len(some):
            return 0.0
        rows = some[evenly(len(some), ROWS).to(worth.device)]
        blocks = evenly(transform.width // BLOCK, COLUMNS // BLOCK)
        columns = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten().to(worth.device)
        weight = _rows(self._statistics.weights, rows).double()
        weight = transform.fuse(weight)[:, columns].float()

        def moment() -> Tensor:
            whole = self._statistics.transformed_hessian(transform)
            return whole[columns][:, columns]

        wrong = self._judgement.rounded(weight, moment) - weight
        outputs = self._operands(transform)[1][:, columns] @ wrong.T
        part = (outputs.double().square().mean(0) * worth[rows]).sum()
        whole = part * (worth.sum() / worth[rows].sum()) * (transform.width / len(columns))
        return self._part(whole)

    def _operands(self, transform: Transform) -> tuple[Tensor, Tensor]:
        values = transform.online(self._judgement.held_out)
        return values, fake_quantize(values, self._judgement.activations)

    def _part(self, loss: Tensor) -> float:
        """0 where inputs do nothing: then nothing is lost, whatever the transform."""
        return float(loss) / self._signal if self._signal > 0 else 0.0


def evenly(total: int, most: int) -> Tensor:
    """At most so many of the numbers from 0 on, evenly spread."""
    count = min(total, most)
    return (torch.arange(count) * total) // max(1, count)


def _unexplained(errors: Tensor, values: Tensor) -> Tensor:
    """The part of errors that no fixed matrix within an MX block predicts from the values."""
    x, e = (part.unflatten(-1, (-1, BLOCK)).transpose(0, 1).double() for part in (values, errors))
    moments = x.mT @ x
    level = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(level > 0, _RIDGE * level, 1.0)
    eye = torch.eye(BLOCK, dtype=x.dtype, device=x.device)
    maps = torch.linalg.solve(moments + added[:, None, None] * eye, x.mT @ e)
    rest: Tensor = (e - x @ maps).float().transpose(0, 1)
    return rest.flatten(-2)


def _rows(weights: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """Some rows of the stacked weights."""
    found, before = [], 0
    for weight in weights:
        here = rows[(rows >= before) & (rows < before + len(weight))] - before
        found.append(weight[here].float())
        before += len(weight)
    return torch.cat(found)
