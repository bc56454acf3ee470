"""Which sites hurt the model most: one site at a time in W4A4, everything else in BF16.

A site's own output error does not tell what the model makes of it: the next norm may forget it, or
all later layers may build on it. KL from the unquantized predictions does. Single-site figures do
not add up to that of the quantized model, because errors meet; they are for ranking.

The price is a forward pass of the model for each site and method.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from mxtorq.calibration.capture import batches
from mxtorq.evaluation.perplexity import per_prediction, predictions
from mxtorq.reports.inspection import Harm


@torch.no_grad()
def harms(
    model: nn.Module,
    reference: nn.Module,
    replacements: Mapping[tuple[str, str], Mapping[str, nn.Module]],
    windows: Int64[Tensor, "n seqlen"],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Harm]:
    """What each replacement alone does to the predictions, most harmful first.

    Args:
        model: what modules are replaced in, one entry at a time; it ends as it was.
        reference: the unquantized model, which may be the same.
        replacements: by site and method, the modules by full name.
        windows: of the text.
        progress: (passes done, passes in all).
    """
    device = next(model.parameters()).device
    groups = batches(windows)
    sums = {key: torch.zeros(2, dtype=torch.float64) for key in replacements}
    done, total = 0, len(groups) * len(replacements)
    progress(0, total)
    for batch in groups:
        ids = batch.to(device)
        expected = predictions(reference, ids)
        for key, modules in replacements.items():
            with replaced_(model, modules):
                found = per_prediction(predictions(model, ids), expected, ids[:, 1:].flatten())
            sums[key] += torch.stack([found["kl"].sum(), found["agreement"].sum()]).cpu()
            done += 1
            progress(done, total)
    count = len(windows) * (windows.shape[1] - 1)
    made = [
        Harm(site=site, method=method, kl=float(kl) / count, agreement=float(same) / count)
        for (site, method), (kl, same) in sums.items()
    ]
    return sorted(made, key=lambda harm: -harm.kl)


@contextmanager
def replaced_(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While this lasts, a model has other modules at some places."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
