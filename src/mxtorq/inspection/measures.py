"""What MXFP4 sees of a tensor: block variances, codes, scales, errors, loud channels, long rows.

TORQ (arXiv 2605.19561) names two defects. Between blocks: a few of them hold most of the variance.
Inside of blocks: heavy tails leave most of the codebook idle. `Measure` counts both, and what comes
of them, for rows that arrive in parts; `picture` does so for a tensor that is there as a whole.

Variances are mean squares about zero, as in the paper's second moment. Codes and scales are those
that `formats.mxfp4.quantize` gives, so every count is exact; sums of squares are float64 over exact
squares of float32 numbers. Nothing is sampled.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mxtorq.errors import ModelError
from mxtorq.formats import e8m0
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, as_blocks, chunks
from mxtorq.formats.spec import BLOCK, E2M1_MAGNITUDES, E8M0_BIAS, E8M0_NAN
from mxtorq.kernels.dispatch import dequantize, quantize
from mxtorq.reports.inspection import Channel, Picture

WORST = 8
"""Channels that are named."""

LONGEST = 4
"""Rows that are named."""


class Measure:
    """Sums over rows of one width, filled part by part."""

    def __init__(self, width: int, rule: ScaleRule = ScaleRule.FLOOR) -> None:
        self._width, self._rule = width, rule
        self._rows = 0
        self._bytes = torch.zeros(256, dtype=torch.int64)  # of pairs of codes
        self._scales = torch.zeros(256, dtype=torch.int64)
        self._cut = torch.zeros((), dtype=torch.int64)
        self._energy = torch.zeros(width, dtype=torch.float64)
        self._noise = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def add(self, values: Float[Tensor, "*rows d"]) -> None:
        """Take in more rows; they are rounded to float32 first.

        Raises:
            FormatError: 32 does not divide their width.
            ModelError: one of them holds NaN or Inf.
        """
        rows = values.reshape(-1, values.shape[-1]).float()
        as_blocks(rows)
        for name in ("_bytes", "_scales", "_cut", "_energy", "_noise"):
            setattr(self, name, getattr(self, name).to(rows.device))
        for here in chunks(rows, self._width // BLOCK):
            self._add(rows[here])
        self._rows += len(rows)

    def _add(self, rows: Tensor) -> None:
        codes = quantize(rows, self._rule)
        assert isinstance(codes, MXFP4)  # which a ScaleRule gives
        found = torch.bincount(codes.e8m0.flatten(), minlength=256)
        if int(found[E8M0_NAN]):
            raise ModelError(
                asked="a picture of a tensor in MXFP4",
                found=f"NaN or Inf in {int(found[E8M0_NAN])} blocks",
                why="such a block has no codes",
                todo="evaluate the unquantized model first; then look for a transform that is "
                "nearly singular",
            )
        self._scales += found
        self._bytes += torch.bincount(codes.packed.flatten(), minlength=256)
        most = E2M1_MAGNITUDES[-1] * e8m0.decode(codes.e8m0)
        self._cut += (rows.abs().unflatten(-1, (-1, BLOCK)) > most[..., None]).sum()
        exact = rows.double()
        self._energy += exact.square().sum(0)
        self._noise += (exact - dequantize(codes).double()).square().sum()

    def finish(self) -> Picture:
        """The picture of everything that was added, which is at least one row."""
        energy, rows, blocks = self._energy.cpu(), self._rows, self._width // BLOCK
        by_block = energy.view(blocks, BLOCK)
        pairs = self._bytes.cpu().view(16, 16)  # high nibble, low nibble
        total = float(energy.sum())
        worst = energy.topk(min(WORST, self._width))
        return Picture(
            rows=rows,
            block_variances=(by_block.sum(1) / (rows * BLOCK)).tolist(),
            position_variances=(by_block.sum(0) / (rows * blocks)).tolist(),
            code_counts=(pairs.sum(0) + pairs.sum(1)).tolist(),
            cut=int(self._cut),
            scale_exponents={
                str(byte - E8M0_BIAS): int(self._scales[byte])
                for byte in self._scales.nonzero().flatten().tolist()
            },
            relative_error=float(self._noise) / total if total else 0.0,
            worst_channels=[
                Channel(index=index, share=share / total if total else 0.0)
                for share, index in zip(worst.values.tolist(), worst.indices.tolist(), strict=True)
            ],
        )


def picture(values: Float[Tensor, "*rows d"], rule: ScaleRule = ScaleRule.FLOOR) -> Picture:
    """What MXFP4 sees of a tensor. Raises as `Measure.add`."""
    measure = Measure(values.shape[-1], rule)
    measure.add(values)
    return measure.finish()


@dataclass(frozen=True)
class LongRow:
    """A row, and how many times as long as the median one it is."""

    index: int
    ratio: float


class Lengths:
    """Euclidean lengths of rows that arrive part by part, in order."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, values: Float[Tensor, "*rows d"]) -> None:
        """Take in the next rows."""
        rows = values.reshape(-1, values.shape[-1]).float()
        self._parts.append(torch.linalg.vector_norm(rows, dim=-1).cpu())

    def longest(self, most: int = LONGEST) -> list[LongRow]:
        """The longest rows of all, longest first; none where the median length is 0."""
        lengths = torch.cat(self._parts).double()
        middle = float(lengths.median())
        if not middle:
            return []
        found = lengths.topk(min(most, len(lengths)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [LongRow(index, length / middle) for index, length in pairs]
