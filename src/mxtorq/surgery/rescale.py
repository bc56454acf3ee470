"""Move a factor per channel from a site's linears into whatever produces the channel.

x_c becomes s_c x_c at the source (a norm's gain, or rows and bias of a linear) and column c of each
linear that reads it is divided by s_c, so the function is kept; with powers of two to the bit.

A gain that a checkpoint keeps in BF16 is rounded to BF16 here, and the readers are divided by what
the gain was *really* multiplied with: smoothing costs the function nothing, whatever its factors.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from mxtorq.errors import ModelError
from mxtorq.models.family import Site
from mxtorq.surgery.linear import StoredLinear, linear_at
from mxtorq.transforms.base import Transform
from mxtorq.transforms.chain import Chain, chain
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.rotation import Identity


def is_norm(layer: nn.Module, path: str) -> bool:
    """Whether a site's source is a norm with a gain for each channel."""
    source: Any = layer.get_submodule(path)
    return int(source.weight.dim()) == 1


def source_width(layer: nn.Module, site: Site) -> int:
    """Free channels of a site: with grouped-query attention o_in repeats those of v_proj."""
    source: Any = layer.get_submodule(site.source)
    return len(source.weight)


@torch.no_grad()
def rescale_site_(
    layer: nn.Module,
    site: Site,
    factors: Float[Tensor, " channels"],
    head_dim: int,
    kept: torch.dtype | None = None,
) -> Float[Tensor, " channels"]:
    """Multiply the site's channels by ``factors`` and divide the readers' columns by them.

    Args:
        layer: a decoder layer.
        site: one of its sites.
        factors: positive, one for each channel of the site's source.
        head_dim: by which grouped-query attention repeats channels at o_in; matters only there.
        kept: the dtype in which a checkpoint keeps norms and biases; they are rounded to it.

    Returns:
        The factors that were really applied: those of a norm absorb the rounding of its gain.

    Raises:
        ModelError: the reader's width is no multiple of the source's.
    """
    _widen_(layer, site)
    source: Any = layer.get_submodule(site.source)
    width = linear_at(layer, site.linears[0]).in_features
    repeats, rest = divmod(width, len(factors))
    if rest or len(factors) != len(source.weight):
        raise ModelError(
            asked=f"a rescaling of {site.name} by {len(factors)} factors",
            found=f"{site.source} with {len(source.weight)} channels, read as {width}",
            why="each input channel must come from one channel of the source",
            todo="check the family's description of this site",
        )
    if is_norm(layer, site.source):
        before = source.weight.clone()
        source.weight.copy_(_rounded(before * factors, kept))
        usable = (before != 0) & (source.weight != 0)
        factors = torch.where(usable, source.weight / before, factors)
    for path in site.sources:
        source = layer.get_submodule(path)
        if not is_norm(layer, path):
            source.weight.mul_(factors[:, None])
        if getattr(source, "bias", None) is not None:
            source.bias.copy_(_rounded(source.bias * factors, kept))
    columns = factors
    if repeats > 1:  # each key/value head feeds `repeats` query heads in a row
        columns = factors.view(-1, 1, head_dim).expand(-1, repeats, -1).reshape(-1)
    for path in site.linears:
        linear_at(layer, path).weight.div_(columns)
    for path in site.kept_readers:
        reader: Any = layer.get_submodule(path)
        reader.weight.div_(columns)
    return factors


def merge_diagonal_(
    layer: nn.Module, site: Site, transform: Transform, kept: torch.dtype
) -> tuple[Transform, Float64[Tensor, " d"] | None]:
    """Move the diagonal that a transform begins with into the site's source, where that can be.

    It cannot where several input channels come from one channel of the source (o_in with
    grouped-query attention), and it shall not where something reads the source that stays in BF16
    (a router), whose columns would be rounded: there the factors stay online.

    Returns:
        What is left to do online, and the factors that the site's channels were multiplied with
        (None: nothing was merged).
    """
    first, rest = split_diagonal(transform)
    if first is None or not merges(layer, site):
        return transform, None
    _widen_(layer, site)
    wanted = first.factors.to(linear_at(layer, site.linears[0]).weight.dtype)
    # Every channel has its own source here, so that no head is repeated: one head of all channels.
    applied = rescale_site_(layer, site, wanted, head_dim=len(wanted), kept=kept)
    return rest, applied.double()


def can_merge(layer: nn.Module, sites: Mapping[str, Site], site: Site) -> bool:
    """Whether a diagonal of a site may go into its source: a norm, or linears that are quantized
    themselves. Whether there is a place for it in the source is what `merges` says."""
    quantized = {path for each in sites.values() for path in each.linears}
    return quantized.issuperset(site.sources) or is_norm(layer, site.source)


def merges(layer: nn.Module, site: Site) -> bool:
    """Whether a diagonal can be merged into a site's source: each channel has one of its own, and
    nothing reads it that stays in BF16."""
    width = linear_at(layer, site.linears[0]).in_features
    return source_width(layer, site) == width and not site.kept_readers


def split_diagonal(transform: Transform) -> tuple[Diagonal | None, Transform]:
    """The diagonal that a transform begins with, and what comes after it."""
    first, *more = transform.links if isinstance(transform, Chain) else (transform,)
    if not isinstance(first, Diagonal):
        return None, transform
    return first, chain(*more) if more else Identity(first.width)


def _widen_(layer: nn.Module, site: Site) -> None:
    """Weights that wait in BF16 go to float32 before they are multiplied with anything."""
    for path in (*site.sources, *site.linears, *site.kept_readers):
        part = layer.get_submodule(path)
        if isinstance(part, StoredLinear):
            part.widen_()


def _rounded(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values if dtype is None else values.to(dtype).to(values.dtype)
