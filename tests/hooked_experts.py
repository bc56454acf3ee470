"""What reaches each expert, the slow obvious way: hooks on its linears, every moment at once.

One pass over the layer with its unquantized linears; an accumulator an expert and a site, fed
batch by batch with what the linear itself is called with. `calibration.experts` has to give the
same bits.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from mxtorq.calibration.capture import LayerInput
from mxtorq.calibration.experts import EXPERT_SAMPLE, ExpertInputs
from mxtorq.calibration.statistics import SiteAccumulator
from mxtorq.models.family import Site


@torch.no_grad()
def capture(
    layer: torch.nn.Module,
    sites: Mapping[str, Site],
    inputs: list[LayerInput],
    through: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
) -> dict[str, list[ExpertInputs]]:
    """As `capture_experts`."""
    rows: dict[str, list[torch.Tensor]] = {}
    firsts = {name: [g[0] for g in site.groups] for name, site in sites.items() if site.experts}
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: rows.setdefault(path, []).append(args[0].clone())
        )
        for paths in firsts.values()
        for path in paths
    ]
    for item in inputs:
        layer(item.hidden, **item.arguments)
    for hook in hooks:
        hook.remove()
    found: dict[str, list[ExpertInputs]] = {}
    for name, paths in firsts.items():
        for path in paths:
            linear: Any = layer.get_submodule(path)
            found.setdefault(name, []).append(
                _summed(name, linear.in_features, rows.get(path, []), through.get(name))
            )
    return found


def _summed(
    site: str,
    width: int,
    batches: list[torch.Tensor],
    through: Callable[[torch.Tensor], torch.Tensor] | None,
) -> ExpertInputs:
    tokens = sum(map(len, batches))
    kept = torch.cat([torch.empty(0, width), *batches])[:EXPERT_SAMPLE]
    hessian = None
    if through is not None and tokens >= width:
        sums = SiteAccumulator(site, width, 0, 0)
        for batch in batches:
            sums.add(through(batch))
        hessian = partial(torch.clone, sums.take_hessian())
    return ExpertInputs(tokens=tokens, sample=kept.float(), hessian=hessian)
