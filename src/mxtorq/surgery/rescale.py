"""Move a factor per channel from a site's linears into whatever produces the channel.

x_c becomes s_c x_c at the source (a norm's gain, or rows and bias of a linear) and column c of each
linear that reads it is divided by s_c, so the function is kept; with powers of two to the bit.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mxtorq.errors import ModelError
from mxtorq.models.family import Site
from mxtorq.surgery.linear import linear_at


def source_width(layer: nn.Module, site: Site) -> int:
    """Free channels of a site: with grouped-query attention o_in repeats those of v_proj."""
    source: Any = layer.get_submodule(site.source)
    return len(source.weight)


@torch.no_grad()
def rescale_site_(
    layer: nn.Module, site: Site, factors: Float[Tensor, " channels"], head_dim: int
) -> None:
    """Multiply the site's channels by ``factors`` and divide the readers' columns by them.

    Args:
        layer: a decoder layer.
        site: one of its sites.
        factors: positive, one for each channel of the site's source.
        head_dim: by which grouped-query attention repeats channels at o_in.

    Raises:
        ModelError: the reader's width is no multiple of the source's.
    """
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
    source.weight.mul_(factors if source.weight.dim() == 1 else factors[:, None])
    if getattr(source, "bias", None) is not None:
        source.bias.mul_(factors)
    columns = factors
    if repeats > 1:  # each key/value head feeds `repeats` query heads in a row
        columns = factors.view(-1, 1, head_dim).expand(-1, repeats, -1).reshape(-1)
    for path in site.linears:
        linear_at(layer, path).weight.div_(columns)
