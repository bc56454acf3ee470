"""Perplexity over non-overlapping windows, and how far the predictions are from another model's.

The text is cut into windows of ``seqlen`` tokens from its beginning, the rest is dropped. In each
window the model predicts tokens 2 to seqlen from those before them in the same window. Perplexity
is exp of the mean negative log-likelihood over all predictions. With WikiText-2's raw test split
joined by blank lines and windows of 2048 this is the protocol of the GPTQ line of papers.

KL(reference || model) over the same predictions sees what perplexity averages away: a model that
is wrong differently but equally often has the same perplexity and another distribution.
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
    kl: float | None
    """Mean KL(reference || model) of a prediction, in nats; None without a reference."""


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Int64[Tensor, "n seqlen"],
    progress: Callable[[int, int], None] = lambda done, total: None,
    reference: nn.Module | None = None,
) -> Perplexity:
    """Perplexity of a causal language model; logits are read as float32, sums are float64.

    Raises:
        ModelError: the model gives NaN or Inf.
    """
    device = next(model.parameters()).device
    total, divergence, done = 0.0, 0.0, 0
    progress(0, len(windows))
    for batch in batches(windows):
        ids = batch.to(device)
        logits = _predictions(model, ids)
        expected = None if reference is None else _predictions(reference, ids)
        targets = ids[:, 1:].flatten()
        for start in range(0, len(targets), _ROWS):
            here = slice(start, start + _ROWS)
            scores = logits[here].float().log_softmax(-1)
            total -= scores.gather(-1, targets[here, None]).double().sum().item()
            if expected is not None:
                truth = expected[here].float().log_softmax(-1)
                divergence += (truth.exp() * (truth - scores)).double().sum().item()
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
    return Perplexity(
        value=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        predictions=count,
        kl=None if reference is None else divergence / count,
    )


def _predictions(model: nn.Module, ids: Int64[Tensor, "b seqlen"]) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)
