"""The whole model as methods see it that learn rotations before layers are quantized.

The loss is the mean next-token negative log-likelihood with the inputs of all quantized linears
rounded to MXFP4 (floor scales) in rotated coordinates. Weights are *not* rounded, as in SpinQuant's
released setting for weights that GPTQ rounds afterwards (arXiv 2405.16406): GPTQ absorbs what the
weights lose, so that only activations should shape the rotation.

Nothing is merged to compute it. Let x be the output of an RMSNorm without its gain g. After merging
R1 the linear sees x R1 and has the weights (W g) R1, hence

    round(x R1) ((W g) R1)^T = (round(x R1) R1^T g) W^T,

so it is enough to rotate, round and rotate back in front of each linear; all else, the residual
stream included, stays in its own coordinates, where an unrounded model computes the same. That
costs two products with R1 a site in place of a rotated copy, with gradient, of every weight. For
values the same holds head by head with R2. Only a site with an online transform, which acts after
the merged rotation, gets transformed weights, T^-T on their columns, for the call.

Rounding passes gradients straight through. On orthogonal matrices this is the loss, and the
gradient along them, of the merged model; beside them only the merged model's differs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import fake_quantize
from mxtorq.models.family import Family, SiteName
from mxtorq.surgery.linear import linear_at
from mxtorq.surgery.norms import rms_gain
from mxtorq.surgery.offline import head_width
from mxtorq.transforms.base import Network, NetworkShape, Transform


def network_shape(model: nn.Module, family: Family) -> NetworkShape:
    """A model's sizes; of its sites those that MXFP4 blocks divide."""
    config: Any = model.config
    layers = list(model.get_submodule(family.layers).children())
    widths = {site.name: linear_at(layers[0], site.linears[0]).in_features for site in family.sites}
    return NetworkShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_width(model),
        layers=len(layers),
        sites={name: width for name, width in widths.items() if width % BLOCK == 0},
    )


def network(model: nn.Module, family: Family, windows: Int64[Tensor, "n seqlen"]) -> Network:
    """What `TransformMethod.rotations` may see of a model and its calibration windows.

    The model is neither copied nor changed, and its parameters get no gradients when they are
    frozen. Matrices may be of any float dtype and on any device; the model's are used inside.
    """
    shape = network_shape(model, family)
    return Network(
        shape=shape,
        windows=len(windows),
        loss=partial(_loss, model, family, shape, windows),
    )


def _loss(
    model: nn.Module,
    family: Family,
    shape: NetworkShape,
    windows: Int64[Tensor, "n seqlen"],
    residual: Float[Tensor, "hidden hidden"],
    heads: list[Tensor],
    online: Mapping[SiteName, Transform],
    chosen: list[int],
) -> Float[Tensor, ""]:
    like = next(model.parameters())
    ids = windows[chosen].to(like.device)
    residual, heads = residual.to(like), [head.to(like) for head in heads]
    replaced: dict[str, Tensor] = {}
    hooks: list[tuple[nn.Module, bool, Callable[[Tensor], Tensor]]] = []
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for site in (site for site in family.sites if site.name in shape.sites):
            gain: Tensor | None = None
            merged: Tensor | None = None
            if site.reads_residual:
                gain, merged = rms_gain(layer.get_submodule(site.source)), residual
                key = f"{family.linear_name(index, site.source)}.weight"
                replaced[key] = torch.ones_like(gain)
                for path in site.kept_readers:
                    reader: Any = layer.get_submodule(path)
                    replaced[f"{family.linear_name(index, path)}.weight"] = reader.weight * gain
            elif site.name is SiteName.O_IN and heads:
                merged = heads[index]
            transform = online.get(site.name)
            if transform is not None and transform.kind != "identity":
                transform = transform.to(like.device)
                for path in site.linears:
                    weight = linear_at(layer, path).weight
                    weight = _turned(weight if gain is None else weight * gain, merged)
                    key = f"{family.linear_name(index, path)}.weight"
                    replaced[key] = transform.fuse(weight.double()).to(like.dtype)
                act = partial(_transformed, merged, transform)
            else:
                act = partial(_there_and_back, merged, gain)
            # A norm's output is the input of all linears of its site, so it is rounded once, but
            # not for a reader that stays as it is.
            on_output = site.reads_residual and not site.kept_readers
            for place in (site.source,) if on_output else site.taps:
                hooks.append((layer.get_submodule(place), on_output, act))
    with _hooked(hooks):
        arguments = {"input_ids": ids, "use_cache": False}
        output = torch.func.functional_call(model, replaced, kwargs=arguments, tie_weights=False)
    logits = output.logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def _there_and_back(merged: Tensor | None, gain: Tensor | None, values: Tensor) -> Tensor:
    rounded = _straight_through(_turned(values, merged))
    rounded = _turned(rounded, None if merged is None else merged.T)
    return rounded if gain is None else rounded * gain


def _transformed(merged: Tensor | None, transform: Transform, values: Tensor) -> Tensor:
    return _straight_through(transform.apply(_turned(values, merged)))


def _turned(
    values: Float[Tensor, "*rows d"], matrix: Float[Tensor, "n n"] | None
) -> Float[Tensor, "*rows d"]:
    """Each piece of n features times the matrix."""
    if matrix is None:
        return values
    turned: Tensor = values.unflatten(-1, (-1, len(matrix))) @ matrix
    return turned.flatten(-2)


def _straight_through(values: Tensor) -> Tensor:
    """To the nearest MXFP4 values; backwards the identity.

    The sum gives these values exactly, in any dtype: one is 0 or within a factor of two of what it
    is rounded from, so that the difference is exact (Sterbenz).
    """
    return values + (_nearest(values) - values).detach()


def _nearest(values: Tensor) -> Tensor:
    values = values.detach()
    return fake_quantize(values.float(), ScaleRule.FLOOR).to(values.dtype)


@contextmanager
def _hooked(places: list[tuple[nn.Module, bool, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Each function on its module's output (True) or first input (False) while this lasts."""
    handles = []
    try:
        for module, on_output, act in places:
            if on_output:
                handles.append(module.register_forward_hook(_on_output(act)))
            else:
                handles.append(module.register_forward_pre_hook(_on_input(act)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_output(act: Callable[[Tensor], Tensor]) -> Any:
    return lambda module, args, output: act(output)


def _on_input(act: Callable[[Tensor], Tensor]) -> Any:
    return lambda module, args: (act(args[0]), *args[1:])
