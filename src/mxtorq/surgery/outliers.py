"""Give a small model the channel outliers of a large one, without changing its function.

A freshly trained small model has no outlier channels, so that rounding hardly hurts it. This scales
its channels by the profile of a real LLM (per-channel activation size over the median channel) and
divides the following columns by the same numbers. Factors are rounded to powers of two, which
makes the change exact to the bit.

What it is not: a large model. The weights mirror the outliers exactly here, so that smoothing
alone would undo them, which no real model allows to that degree; it brackets the truth and proves
nothing about the model whose profile it borrows.

The profiles are quantiles (no channel order), made by ``tools/make_outlier_profiles.py``. Channels
are placed by a seeded shuffle; sites that read the residual stream share one placement, as real
models have their outliers in the same channels at every layer.
"""

import json
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mxtorq.errors import UsageError
from mxtorq.models.family import Family, SiteName
from mxtorq.surgery.rescale import rescale_site_, source_width

SMALLEST = 0.0625
"""Profile values below this (dead channels of the real model) are raised to it."""


def profiles() -> dict[str, Any]:
    """The profiles that travel with the package, by name."""
    path = files("mxtorq.embedded") / "outlier_profiles.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def profile_called(name: str) -> dict[str, Any]:
    """The profile of that name.

    Raises:
        UsageError: there is none.
    """
    known = profiles()
    if name not in known:
        raise UsageError(
            asked=f"the outlier profile {name!r}",
            found=f"the profiles {', '.join(known)}",
            why="only these travel with the package",
            todo="name one of them",
        )
    found: dict[str, Any] = known[name]
    return found


def channel_factors(
    profile: dict[str, Any], depth: float, site: SiteName, width: int
) -> Float[Tensor, " width"]:
    """Powers of two, ascending: the profile of the layer at relative ``depth`` in [0, 1)."""
    layers = profile["layers"]
    values = np.maximum(layers[int(depth * len(layers))][site], SMALLEST)
    wanted = np.linspace(0.0, 1.0, width)
    shaped = np.interp(wanted, profile["quantiles"], np.log2(values))
    return torch.from_numpy(np.exp2(np.round(shaped))).float()


def add_outliers_(model: nn.Module, family: Family, name: str, seed: int) -> None:
    """Rescale every site of a model by the profile called ``name``.

    Raises:
        UsageError: there is no such profile.
    """
    profile = profile_called(name)
    draw = torch.Generator().manual_seed(seed)
    placements: dict[int, Tensor] = {}
    layers = list(model.get_submodule(family.layers).children())
    attention: Any = layers[0].get_submodule("self_attn")
    for index, layer in enumerate(layers):
        for site in family.sites:
            width = source_width(layer, site)
            if site.reads_residual and width in placements:
                placement = placements[width]
            else:
                placement = torch.randperm(width, generator=draw)
                if site.reads_residual:
                    placements[width] = placement
            factors = channel_factors(profile, (index + 0.5) / len(layers), site.name, width)
            first = next(layer.parameters())
            rescale_site_(layer, site, factors[placement].to(first), attention.head_dim)
