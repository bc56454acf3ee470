"""What reaches each expert of a layer, beside the statistics that all of them share.

A transform is fitted to the tokens of all experts, for it is one for all. The rounding of an
expert's weights looks at its own tokens, unless they are fewer than the site is wide: their second
moment would be singular, and GPTQ would make errors good in directions that it merely has not seen.
Such an expert takes the moment of all tokens of the site.

One more pass over the layer records what its experts are called with (the inputs of the MLP once,
and which tokens go to whom) and ends there, but for the products that samples need. An expert's
moment is summed from its own rows when a rounding asks for it, so one is in memory at a time; all
would be 4.3 GB for 128 experts of a width of 2048. What down_proj reads is computed for that by the
gate_proj and up_proj that were in place during the pass: they are quantized by then. The
price is that the unquantized ones stay in memory until the layer's last site is done. That is no
new peak, as all of them are there when the first site is rounded; the inner activations of all
tokens, kept instead, would be one.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from mxtorq.calibration.capture import LayerInput, turns
from mxtorq.calibration.statistics import SiteAccumulator
from mxtorq.models.family import Experts, Site
from mxtorq.ranks import SOLO, Ranks

EXPERT_SAMPLE = 64
"""Tokens of each expert that are kept for output errors: its first ones."""

Look = Callable[[Tensor], Tensor]
"""What a site sees of the rows that an expert is called with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertInputs:
    """What reached one expert at one site."""

    tokens: int
    sample: Float[Tensor, "sampled d"]
    hessian: Callable[[], Float64[Tensor, "d d"]] | None
    """Sums up the second moment of its transformed inputs, anew with each call; None where it saw
    too few tokens for one, or none was asked for. Holds on to what was recorded of the layer."""


class _Batch(NamedTuple):
    """What the experts were called with at once."""

    inputs: Float[Tensor, "n d"]
    tokens: dict[int, Int64[Tensor, " m"]]
    """The rows of each expert that got any."""


class _Recorded(Exception):
    """Ends a layer's forward pass once the inputs of its experts are known."""


class _Recorder:
    """Stands before the list of experts and takes in what it is called with."""

    def __init__(self, experts: Any, looks: Mapping[str, list[Look]], keeps: bool) -> None:
        self._experts, self._looks, self._keeps = experts, looks, keeps
        self.called: list[Tensor] = []
        """Inputs and choices of the last call."""
        self.batches: list[_Batch] = []
        self.tokens: dict[int, int] = {}
        self.samples: dict[tuple[str, int], list[Tensor]] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.called = [*args[:2]]
        raise _Recorded

    def take(self, ranks: Ranks) -> None:
        """Take in the last batch of each rank."""
        parts = ranks.gather(self.called)
        self.called = []
        for inputs, chosen in zip(parts[0::2], parts[1::2], strict=True):
            self._add(inputs, chosen)

    def _add(self, inputs: Tensor, chosen: Tensor) -> None:
        batch = _Batch(inputs, {index: rows for index, rows, _ in self._experts.routes(chosen)})
        for index, rows in batch.tokens.items():
            seen = self.tokens.get(index, 0)
            if seen < EXPERT_SAMPLE:
                self._sample(index, inputs[rows], EXPERT_SAMPLE - seen)
            self.tokens[index] = seen + len(rows)
        if self._keeps:
            self.batches.append(batch)

    def _sample(self, index: int, rows: Tensor, most: int) -> None:
        """All of a batch's rows are looked at, as `_moment` does: fewer would round differently."""
        for name, looks in self._looks.items():
            part = looks[index](rows)[:most].to(torch.float32, copy=True)  # a view keeps all rows
            self.samples.setdefault((name, index), []).append(part)


@torch.no_grad()
def capture_experts(
    layer: nn.Module,
    experts: Experts | None,
    sites: Mapping[str, Site],
    inputs: Sequence[LayerInput],
    through: Mapping[str, Callable[[Tensor], Tensor]],
    ranks: Ranks = SOLO,
) -> dict[str, list[ExpertInputs]]:
    """Run a layer up to its experts, over all inputs, and record what each of them gets.

    Args:
        layer: the decoder layer, unquantized. Its linears may be replaced before a moment is asked
            for, and must not be changed in place.
        experts: where they are; they are a `surgery.experts.ExpertList`. None: there are none.
        sites: by full name; those without experts are left out.
        inputs: the layer's inputs, those of this rank; left as they are.
        through: by site, what is done to inputs before their moment; without, no moments.
        ranks: who records together. Each is given what the others recorded, in the order of one
            process: there are few tokens to an expert, and whichever rank rounds it needs all.
    """
    shared = {name: site for name, site in sites.items() if site.experts}
    if experts is None or not shared:
        return {}
    called: Any = layer.get_submodule(experts.module)
    looks = {
        name: [
            _as_called if site.tap == experts.module else called.inner(index)
            for index in range(site.experts)
        ]
        for name, site in shared.items()
    }
    recorder = _Recorder(called, looks, keeps=any(name in through for name in shared))
    hook = called.register_forward_pre_hook(recorder)
    try:
        for item, _ in turns(inputs, ranks)[0]:
            with suppress(_Recorded):
                if item is not None:
                    layer(item.hidden, **item.arguments)
            recorder.take(ranks)
    finally:
        hook.remove()

    found: dict[str, list[ExpertInputs]] = {}
    for name, site in shared.items():
        linear: Any = layer.get_submodule(site.linears[0])
        width, none = linear.in_features, inputs[0].hidden.new_empty(0, dtype=torch.float32)
        for index, look in enumerate(looks[name]):
            tokens = recorder.tokens.get(index, 0)
            moment = partial(_moment, name, width, recorder.batches, index, look)
            known = name in through and tokens >= width
            parts = recorder.samples.get((name, index), [none.view(0, width)])
            found.setdefault(name, []).append(
                ExpertInputs(
                    tokens=tokens,
                    sample=torch.cat(parts),
                    hessian=partial(moment, through[name]) if known else None,
                )
            )
    return found


@torch.no_grad()
def _moment(
    site: str,
    width: int,
    batches: list[_Batch],
    index: int,
    look: Look,
    through: Callable[[Tensor], Tensor],
) -> Float64[Tensor, "d d"]:
    """The second moment of what an expert sees at a site, batch by batch.

    Raises:
        ModelError: an input is NaN or Inf.
    """
    sums = SiteAccumulator(site, width, 0, 0)
    for batch in batches:
        if index in batch.tokens:
            sums.add(through(look(batch.inputs[batch.tokens[index]])))
    return sums.take_hessian()


def _as_called(rows: Tensor) -> Tensor:
    return rows
