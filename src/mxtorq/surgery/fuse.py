"""Put transformed or quantized linears into a decoder layer."""

from collections.abc import Mapping

from torch import nn

from mxtorq.errors import FormatError, ModelError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import NonOCPScale, Scale, ScaledE2M1
from mxtorq.formats.spec import BLOCK
from mxtorq.models.family import Family, Site
from mxtorq.surgery.linear import (
    MXFP4Linear,
    NonOCPLinear,
    TransformedLinear,
    fused_weight,
    linear_at,
)
from mxtorq.surgery.site_input import SiteInput
from mxtorq.transforms.base import Transform


def transform_site_(layer: nn.Module, site: Site, transform: Transform) -> None:
    """Change the coordinates of a site's linears; the function stays as it was."""
    for path in site.linears:
        linear = linear_at(layer, path)
        weight = fused_weight(linear, transform).to(linear.weight.dtype)
        layer.set_submodule(path, TransformedLinear(weight, linear.bias, transform))


def quantize_site_(
    layer: nn.Module,
    site: Site,
    transform: Transform,
    weights: Mapping[str, MXFP4 | ScaledE2M1],
    scale: Scale,
) -> None:
    """Replace a site's linears by quantized ones with the codes in ``weights`` (by linear)."""
    shared = SiteInput(transform, scale, len(site.groups[0]))
    for path in site.linears:
        bias = linear_at(layer, path).bias
        kept = None if bias is None else bias.detach()
        codes = weights[path]
        if isinstance(codes, MXFP4) and isinstance(scale, ScaleRule):
            layer.set_submodule(path, MXFP4Linear(codes, kept, shared))
        elif isinstance(codes, ScaledE2M1) and isinstance(scale, NonOCPScale):
            layer.set_submodule(path, NonOCPLinear(codes, kept, shared))
        else:
            raise FormatError(
                asked=f"{path} with activations under {scale}",
                found=f"weights as {type(codes).__name__}",
                why="weights and activations are either both MXFP4 or both outside of the format",
                todo="round the weights under the same scale",
            )


def require_fit(model: nn.Module, family: Family, allow_unfit: bool) -> dict[str, int]:
    """Sites whose input width is no multiple of the block size: full name -> width.

    Raises:
        ModelError: there are some and that is not allowed, or no other site is left.
    """
    unfit: dict[str, int] = {}
    message, sites = "", 0
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for site in family.sites:
            sites += 1
            width = linear_at(layer, site.linears[0]).in_features
            if width % BLOCK:
                linears = ", ".join(family.linear_name(index, path) for path in site.groups[0])
                message = message or f"{linears}: {width} input features"
                unfit[family.site_name(index, site)] = width
    if unfit and (not allow_unfit or len(unfit) == sites):
        raise ModelError(
            asked=f"a model in MXFP4 blocks of {BLOCK}",
            found=f"{message} (and so {len(unfit)} of {sites} sites)",
            why=f"that is no multiple of {BLOCK}, and the format knows no partial block",
            todo="pass --allow-unfit to keep those sites in BF16 and quantize the others"
            if len(unfit) < sites
            else "no site of this model can hold MXFP4; choose another model",
        )
    return unfit
