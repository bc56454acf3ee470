"""Put transformed or quantized linears into a decoder layer."""

from collections.abc import Mapping

from torch import nn

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.models.family import Family, Site
from mxtorq.surgery.linear import MXFP4Linear, TransformedLinear, fused_weight
from mxtorq.transforms.base import Transform


def transform_site_(layer: nn.Module, site: Site, transform: Transform) -> None:
    """Change the coordinates of a site's linears; the function stays as it was."""
    for path in site.linears:
        linear = layer.get_submodule(path)
        weight = fused_weight(linear, transform).to(linear.weight.dtype)
        layer.set_submodule(path, TransformedLinear(weight, linear.bias, transform))


def quantize_site_(
    layer: nn.Module,
    site: Site,
    transform: Transform,
    weights: Mapping[str, MXFP4],
    rule: ScaleRule,
) -> None:
    """Replace a site's linears by `MXFP4Linear` with the codes in ``weights`` (by linear)."""
    for path in site.linears:
        bias = layer.get_submodule(path).bias
        kept = None if bias is None else bias.detach()
        layer.set_submodule(path, MXFP4Linear(weights[path], kept, transform, rule))


def unfit_sites(model: nn.Module, family: Family, block: int) -> dict[str, int]:
    """Sites whose input width is no multiple of the block size: full name of a linear -> width."""
    found: dict[str, int] = {}
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for site in family.sites:
            width = layer.get_submodule(site.linears[0]).in_features
            if width % block:
                found[family.site_name(index, site)] = width
    return found
