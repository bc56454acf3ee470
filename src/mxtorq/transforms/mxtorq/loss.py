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
from jaxtyping import Float, Float64
from torch import Tensor

from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import fake_quantize
from mxtorq.transforms.base import Judgement, SiteStatistics, Transform
from mxtorq.transforms.congruence import panels

TOKENS = 512
"""Held-out inputs that are rounded, evenly spread."""
GRADIENTS = 512
"""Rows of the metric that errors are judged by, evenly spread."""
ROWS = 64
COLUMNS = 512
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
        inputs = judgement.held_out
        self._held_out = inputs[evenly(len(inputs), TOKENS).to(inputs.device)]
        outputs = self._held_out @ self._metric.float().T
        self._signal = float(_mean_square(outputs))
        blocks = evenly(statistics.width // BLOCK, COLUMNS // BLOCK)
        columns = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        self._columns = columns.to(metric.device)
        self._inputs: dict[Transform, Tensor] = {}  # rounded ones, in these columns

    def of_inputs(self, transform: Transform) -> float:
        """By the rounding of inputs."""
        values, rounded = self._operands(transform)
        self._inputs[transform] = self._some(rounded)
        errors = rounded - values
        if self._judgement.corrected:
            errors = _unexplained(errors, values)
        outputs = errors @ transform.fuse(self._metric).float().T
        return self._part(_mean_square(outputs))

    def of_weights(self, transform: Transform) -> float:
        """By the rounding of weights."""
        worth = self._judgement.output_weights
        some = worth.nonzero().flatten()  # an expert that nobody goes to is worth nothing
        if not len(some):
            return 0.0
        rows = some[evenly(len(some), ROWS).to(worth.device)]
        weight = _rows(self._statistics.weights, rows).double()
        weight = self._some(transform.fuse(weight)).float()

        def moment() -> Tensor:
            # Of T^T H T, with H as symmetric as it is: first the columns, then the rows of these.
            half = self._through(transform, self._statistics.hessian)
            return self._through(transform, half.T.contiguous())

        wrong = self._judgement.rounded(weight, moment) - weight
        inputs = self._inputs.get(transform)
        if inputs is None:
            inputs = self._some(self._operands(transform)[1])
        outputs = inputs @ wrong.T
        part = (outputs.double().square_().mean(0) * worth[rows]).sum()
        of_rows = worth.sum() / worth[rows].sum()
        whole = part * of_rows * (transform.width / len(self._columns))
        return self._part(whole)

    def _some(self, values: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows some"]:
        """The columns in which weights are rounded."""
        every = values.shape[1] == len(self._columns)
        return values.contiguous() if every else values[:, self._columns]

    def _through(self, transform: Transform, rows: Float64[Tensor, "m d"]) -> Tensor:
        """These columns of what a transform makes of rows, panel by panel."""
        return torch.cat([self._some(transform.apply(rows[panel])) for panel in panels(len(rows))])

    def _operands(self, transform: Transform) -> tuple[Tensor, Tensor]:
        values = transform.online(self._held_out)
        return values, fake_quantize(values, self._judgement.activations)

    def _part(self, loss: Tensor) -> float:
        """0 where inputs do nothing: then nothing is lost, whatever the transform."""
        return float(loss) / self._signal if self._signal > 0 else 0.0


def evenly(total: int, most: int) -> Tensor:
    """At most so many of the numbers from 0 on, evenly spread."""
    count = min(total, most)
    return (torch.arange(count) * total) // max(1, count)


def _mean_square(outputs: Float[Tensor, "tokens rows"]) -> Float64[Tensor, ""]:
    squares = outputs.double().square_()
    return squares.mean()


def _unexplained(errors: Tensor, values: Tensor) -> Tensor:
    """The part of errors that no fixed matrix within an MX block predicts from the values."""
    x, e = (part.unflatten(-1, (-1, BLOCK)).transpose(0, 1).double() for part in (values, errors))
    moments = x.mT @ x
    level = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(level > 0, _RIDGE * level, 1.0)
    eye = torch.eye(BLOCK, dtype=x.dtype, device=x.device)
    maps = torch.linalg.solve(moments + added[:, None, None] * eye, x.mT @ e)
    rest: Tensor = e.sub_(x @ maps).float().transpose(0, 1)
    return rest.flatten(-2)


def _rows(weights: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """Some rows of the stacked weights."""
    found, before = [], 0
    for weight in weights:
        here = rows[(rows >= before) & (rows < before + len(weight))] - before
        found.append(weight[here].float())
        before += len(weight)
    return torch.cat(found)
