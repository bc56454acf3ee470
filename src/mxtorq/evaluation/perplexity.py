"""Perplexity over non-overlapping windows, and how far the predictions are from another model's.

The text is cut into windows of ``seqlen`` tokens from its beginning, the rest is dropped. In each
window the model predicts tokens 2 to seqlen from those before them in the same window. Perplexity
is exp of the mean negative log-likelihood over all predictions. With WikiText-2's raw test split
joined by blank lines and windows of 2048 this is the protocol of the GPTQ line of papers.

KL(reference || model) over the same predictions sees what perplexity averages away: a model that
is wrong differently but equally often has the same perplexity and another distribution. Its 99th
percentile is a value that occurs: the smallest one that at least 99 % of the predictions do not
exceed. For that every prediction's KL is kept, in float32.

Every figure is kept window by window too. A window is what a figure's error is estimated from:
tokens inside of one depend on each other, windows hardly do (`reports.intervals`).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor, nn

from mxtorq.calibration.capture import batches
from mxtorq.errors import ModelError
from mxtorq.evaluation.fidelity import ResidualErrors

_ROWS = 1024
"""Predictions whose float32 log-softmax is held at once (a vocabulary can be 150,000 wide)."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A perplexity and what it is made of; the last five only beside a reference."""

    value: float
    nll: float
    """Mean negative log-likelihood of a token, in nats."""
    predictions: int
    windows: dict[str, list[float]]
    """Sums over the predictions of each window: ``nll``, ``kl``, and how often both models predict
    the same token, ``agreement``."""
    kl: float | None = None
    """Mean KL(reference || model) of a prediction, in nats."""
    kl_p99: float | None = None
    """The 99th percentile of that KL over all predictions."""
    agreement: float | None = None
    """Share of predictions whose likeliest token is the reference's."""
    layer_errors: dict[str, float] = field(default_factory=dict)
    """Relative squared error of the residual stream behind each decoder layer."""


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Int64[Tensor, "n seqlen"],
    progress: Callable[[int, int], None] = lambda done, total: None,
    reference: nn.Module | None = None,
    layers: str | None = None,
) -> Perplexity:
    """Perplexity of a causal language model; logits are read as float32, sums are float64.

    Args:
        model: what is evaluated.
        windows: of tokens.
        progress: (windows done, windows in all).
        reference: what its predictions are compared with.
        layers: where both models hold their decoder layers, to compare the residual stream too;
            a batch's hidden states behind all layers are then in memory.

    Raises:
        ModelError: the model gives NaN or Inf.
    """
    device = next(model.parameters()).device
    count = len(windows) * (windows.shape[1] - 1)
    sums: dict[str, list[float]] = {"nll": []}
    divergences: list[Tensor] = []
    residual = None
    if reference is not None:
        sums |= {"kl": [], "agreement": []}
        residual = None if layers is None else ResidualErrors(model, reference, layers)
    done = 0
    progress(0, len(windows))
    with residual or nullcontext():
        for batch in batches(windows):
            ids = batch.to(device)
            expected = None if reference is None else predictions(reference, ids)
            found = per_prediction(predictions(model, ids), expected, ids[:, 1:].flatten())
            for name, values in found.items():
                sums[name] += values.view(len(ids), -1).sum(-1).tolist()
            if "kl" in found:
                divergences.append(found["kl"].float().cpu())
            done += len(batch)
            progress(done, len(windows))
    nll = sum(sums["nll"]) / count
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
        windows=sums,
        kl=sum(sums["kl"]) / count if divergences else None,
        kl_p99=percentile(torch.cat(divergences), 99) if divergences else None,
        agreement=sum(sums["agreement"]) / count if divergences else None,
        layer_errors={} if residual is None else residual.by_layer(),
    )


def percentile(values: Float32[Tensor, " n"], percent: int) -> float:
    """The smallest of the values that at least ``percent`` % of them do not exceed."""
    rank = -(-percent * len(values) // 100)
    return float(values.kthvalue(max(1, rank)).values)


def per_prediction(
    logits: Float[Tensor, "n vocabulary"],
    expected: Float[Tensor, "n vocabulary"] | None,
    targets: Int64[Tensor, " n"],
) -> dict[str, Float64[Tensor, " n"]]:
    """``nll``, and beside expected logits ``kl`` and ``agreement``, of each prediction."""
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(targets), _ROWS):
        here = slice(start, start + _ROWS)
        scores = logits[here].float().log_softmax(-1)
        nll = -scores.gather(-1, targets[here, None]).double().squeeze(-1)
        parts.setdefault("nll", []).append(nll)
        if expected is not None:
            truth = expected[here].float().log_softmax(-1)
            kl = (truth.exp() * (truth - scores)).double().sum(-1)
            parts.setdefault("kl", []).append(kl)
            same = (truth.argmax(-1) == scores.argmax(-1)).double()
            parts.setdefault("agreement", []).append(same)
    return {name: torch.cat(values) for name, values in parts.items()}


def predictions(
    model: nn.Module, ids: Int64[Tensor, "b seqlen"]
) -> Float[Tensor, "predictions vocabulary"]:
    """The logits of tokens 2 to seqlen of each window."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)
