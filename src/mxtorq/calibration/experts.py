"""What reaches each expert of a layer, beside the statistics that all of them share.

A transform is fitted to the tokens of all experts, for it is one for all. The rounding of an
expert's weights looks at its own tokens, unless they are fewer than the site is wide: their second
moment would be singular, and GPTQ would make errors good in directions that it merely has not seen.
Such an expert takes the moment of all tokens of the site.

It costs one more pass over the layer, and with moments a float64 matrix for each expert that saw a
token: 4.3 GB for 128 experts of a width of 2048. Of several ranks each runs its own batches and is
given what reached the experts of the others, in the order of one process: there are few tokens to
an expert, and whichever rank rounds it needs all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from mxtorq.calibration.capture import LayerInput, turns
from mxtorq.calibration.statistics import SiteAccumulator
from mxtorq.models.family import Site
from mxtorq.ranks import SOLO, Ranks

EXPERT_SAMPLE = 64
"""Tokens of each expert that are kept for output errors: its first ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertInputs:
    """What reached one expert at one site."""

    tokens: int
    sample: Float[Tensor, "sampled d"]
    hessian: Float64[Tensor, "d d"] | None
    """The second moment of its transformed inputs; None where it saw too few tokens for one, or
    none was asked for."""


class _Collector:
    def __init__(self, site: str, width: int, through: Callable[[Tensor], Tensor] | None) -> None:
        self._site, self._width, self._through = site, width, through
        self._moment: SiteAccumulator | None = None
        self._sample: list[Tensor] = []
        self._tokens = 0

    def add(self, rows: Tensor) -> None:
        self._sample.append(rows[: max(0, EXPERT_SAMPLE - self._tokens)].float())
        self._tokens += len(rows)
        if self._through is not None:
            self._moment = self._moment or SiteAccumulator(self._site, self._width, 0, 0)
            self._moment.add(self._through(rows))

    def finish(self, like: Tensor) -> ExpertInputs:
        enough = self._moment is not None and self._tokens >= self._width
        return ExpertInputs(
            tokens=self._tokens,
            sample=torch.cat([like.new_empty(0, self._width, dtype=torch.float32), *self._sample]),
            hessian=self._moment.take_hessian() if self._moment and enough else None,
        )


@torch.no_grad()
def capture_experts(
    layer: nn.Module,
    sites: Mapping[str, Site],
    inputs: Sequence[LayerInput],
    through: Mapping[str, Callable[[Tensor], Tensor]],
    ranks: Ranks = SOLO,
) -> dict[str, list[ExpertInputs]]:
    """Run a layer over all inputs and record what reaches each expert of the sites that have any.

    Args:
        layer: the decoder layer, unquantized.
        sites: by full name; those without experts are left out.
        inputs: the layer's inputs, those of this rank; left as they are.
        through: by site, what is done to inputs before their moment; without, no moments.
        ranks: who records together.

    Raises:
        ModelError: an activation is NaN or Inf.
    """
    firsts = {name: [g[0] for g in site.groups] for name, site in sites.items() if site.experts}
    if not firsts:
        return {}
    collectors: dict[str, list[_Collector]] = {name: [] for name in firsts}
    heard: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in firsts}

    def recorder(name: str, number: int) -> Any:
        return lambda module, args: heard[name].append((number, args[0]))

    hooks = []
    for name, paths in firsts.items():
        for number, path in enumerate(paths):
            linear: Any = layer.get_submodule(path)
            collectors[name].append(_Collector(name, linear.in_features, through.get(name)))
            hooks.append(linear.register_forward_pre_hook(recorder(name, number)))
    try:
        for item, _ in turns(inputs, ranks)[0]:
            if item is not None:
                layer(item.hidden, **item.arguments)
            for name, calls in heard.items():
                numbers = ranks.all_json([number for number, _ in calls])
                parts = ranks.gather([rows for _, rows in calls])
                for number, rows in zip(chain.from_iterable(numbers), parts, strict=True):
                    collectors[name][number].add(rows)
                calls.clear()
    finally:
        for hook in hooks:
            hook.remove()
    like: Any = next(layer.parameters())
    return {name: [each.finish(like) for each in found] for name, found in collectors.items()}
