"""Perplexity over non-overlapping windows.

The text is cut into windows of ``seqlen`` tokens from its beginning, the rest is dropped. In each
window the model predicts tokens 2 to seqlen from those before them in the same window. Perplexity
is exp of the mean negative log-likelihood over all predictions. With WikiText-2's raw test split
joined by blank lines and windows of 2048 this is the protocol of the GPTQ line of papers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from mxtorq.calibration.capture import batches
from mxtorq.errors import ModelError

_ROWS = 1024
"""Predictions whose float32 log-softmax is held at once (a vocabulary can be 150,000 wide)."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A perplexity and what it is made of."""

    value: float
    nll: float
    """Mean negative log-likelihood of a token, in nats."""
    predictions: int


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Int64[Tensor, "n seqlen"],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity of a causal language model; logits are read as float32, sums are float64.

    Raises:
        ModelError: the model gives NaN or Inf.
    """
    device = next(model.parameters()).device
    total, done = 0.0, 0
    progress(0, len(windows))
    for batch in batches(windows):
        ids = batch.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        for start in range(0, len(targets), _ROWS):
            rows = logits[start : start + _ROWS].float()
            losses = nn.functional.cross_entropy(
                rows, targets[start : start + _ROWS], reduction="none"
            )
            total += losses.double().sum().item()
        done += len(batch)
        progress(done, len(windows))
    count = len(windows) * (windows.shape[1] - 1)
    nll = total / count
    if not math.isfinite(nll):
        raise ModelError(
            asked="the perplexity of a model",
            found=f"a log-likelihood of {nll}",
            why="its logits hold NaN or Inf",
            todo="run `mxtorq inspect` on the checkpoint, or evaluate the unquantized model first",
        )
    return Perplexity(value=math.exp(nll) if nll < 700 else math.inf, nll=nll, predictions=count)
