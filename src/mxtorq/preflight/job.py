"""The sizes that everything in a forecast is computed from: of the model, and of what is asked.

They are shapes alone, so a model at rest has them before one of its weights is read.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch

from mxtorq.calibration.capture import BATCH_TOKENS
from mxtorq.calibration.data import Windows
from mxtorq.choosing import least_batches
from mxtorq.config import Recipe
from mxtorq.loading.source import Source
from mxtorq.loading.writer import outside_layers
from mxtorq.models.family import SiteName
from mxtorq.moments import needs_hessians
from mxtorq.surgery.linear import linear_at

BF16 = 2
"""Bytes of a number in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class SiteSizes:
    """A quantized site of a layer."""

    width: int
    rows: int
    """Of the weights that are rounded as one matrix: of one expert where there are experts."""
    tallest: int
    """Rows of the largest of its linears."""
    groups: int
    """How many such matrices there are."""
    experts: bool
    passes: int
    """Inputs that a token has there."""

    @property
    def stacked(self) -> int:
        """Numbers of the weights that are rounded as one matrix."""
        return self.rows * self.width

    @property
    def largest(self) -> int:
        """Numbers of its largest linear."""
        return self.tallest * self.width


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model and what shall be done to it."""

    device: torch.device
    layers: int
    layer: int
    """Numbers of a decoder layer, of the largest one."""
    sites: tuple[SiteSizes, ...]
    outside: tuple[int, ...]
    """Numbers of each tensor outside of the layers."""
    embedding: int
    """Numbers of the embedding."""
    hidden: int
    attention: int
    """What attention computes with for a token: the width of its output projection's input."""
    mlp: int
    """Likewise the MLP's, of one expert."""
    tokens: int
    seqlen: int
    in_memory: bool
    """Whether the model is in memory as a whole before anything else happens."""
    recipe: Recipe

    @property
    def size(self) -> int:
        """Bytes of a number in computations."""
        return 4 if self.device.type == "cpu" else BF16

    @property
    def batch(self) -> int:
        """Tokens of a forward pass."""
        windows = self.tokens // self.seqlen // least_batches(self.recipe.method)
        return max(1, min(windows, BATCH_TOKENS // self.seqlen)) * self.seqlen

    @property
    def batches(self) -> int:
        """Forward passes through a layer for all tokens."""
        return -(-self.tokens // self.batch)

    @property
    def whole(self) -> bool:
        """Whether the model is changed as a whole, so that all of it has to be in memory."""
        return needs_whole(self.recipe) or self.in_memory

    @property
    def total(self) -> int:
        """Numbers of the model."""
        return self.layers * self.layer + sum(self.outside)

    @property
    def quantized(self) -> int:
        """Numbers of a layer that become MXFP4."""
        return sum(site.groups * site.stacked for site in self.sites)

    @property
    def hessians(self) -> bool:
        """Whether second moments are summed up."""
        return needs_hessians(self.recipe) or self.recipe.rounding.sees_rounded_inputs

    @property
    def activations(self) -> int:
        """Bytes of what a layer gets, of all tokens."""
        return self.tokens * self.hidden * self.size


def needs_whole(recipe: Recipe) -> bool:
    """Whether a recipe changes a model as a whole."""
    return recipe.outliers is not None or recipe.method.rotates


def job_of(source: Source, recipe: Recipe, windows: Windows, unfit: Container[str]) -> Job:
    """The sizes of a model and of what shall be done to it.

    Args:
        source: the model, at rest or in memory.
        recipe: how.
        windows: what it is calibrated on.
        unfit: sites that stay in BF16.
    """
    family, config = source.family, source.config
    layers: list[Any] = list(source.model.get_submodule(family.layers).children())
    sites, widths = [], {}
    for site in family.sites:
        rows = [linear_at(layers[0], path).out_features for path in site.groups[0]]
        widths[site.name] = linear_at(layers[0], site.linears[0]).in_features
        if family.site_name(0, site) not in unfit:
            sites.append(
                SiteSizes(
                    width=widths[site.name],
                    rows=sum(rows),
                    tallest=max(rows),
                    groups=len(site.groups),
                    experts=site.experts > 0,
                    passes=site.passes,
                )
            )
    embedding: Any = source.model.get_submodule(family.embedding)
    return Job(
        device=source.device,
        layers=len(layers),
        layer=max(sum(part.numel() for part in layer.parameters()) for layer in layers),
        sites=tuple(sites),
        outside=tuple(source.model.get_parameter(n).numel() for n in outside_layers(source)),
        embedding=embedding.weight.numel(),
        hidden=config.hidden_size,
        attention=widths[SiteName.O_IN],
        mlp=widths[SiteName.DOWN_IN],
        tokens=windows.ids.numel(),
        seqlen=windows.ids.shape[1],
        in_memory=source.shards is None,
        recipe=recipe,
    )
