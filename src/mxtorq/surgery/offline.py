"""Merge rotations into a model's weights: the function stays, the coordinates change.

With every hidden state h as h R (R orthogonal), rows of the embedding become E R, a linear that
reads the stream W R, and one that writes into it R^T W with bias b R. That is exact for RMSNorm
once its gain is gone from between: |h R| = |h|, so rms(h R) = rms(h). So gains are folded into the
linears behind them first.

Embeddings are *not* centred, and no mean is taken out of the writers, as some rotation code bases
do: LayerNorm subtracts a mean and needs that, RMSNorm subtracts nothing and it would change the
function.

Inside attention, values may be rotated head by head: attention mixes tokens, not features, so what
v_proj's outputs get, o_proj's inputs undo. With grouped-query attention a key/value head serves
several query heads, hence one rotation for all heads of a layer.

All arithmetic is in float64, and each step rounds once to the parameter's dtype.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mxtorq.errors import ModelError
from mxtorq.models.family import Family, SiteName
from mxtorq.surgery.linear import linear_at
from mxtorq.surgery.norms import require_rms_norm, rms_gain, stream_norms
from mxtorq.transforms.base import OfflineRotations, Rotation

_ROWS = 8192
"""Rows that are rotated at once: bounds the float64 scratch."""


@torch.no_grad()
def apply_offline_(model: nn.Module, family: Family, rotations: OfflineRotations) -> None:
    """Fold norms and merge all rotations; with none of them nothing at all is touched.

    Norms are folded, and a tied head untied, only for a rotation of the residual stream.

    Raises:
        ModelError: a norm is no RMSNorm, or a rotation does not fit the model.
    """
    if rotations.residual is not None:
        fold_norms_(model, family)
        rotate_residual_(model, family, rotations.residual)
    if not rotations.heads:
        return
    layers = list(model.get_submodule(family.layers).children())
    if len(layers) != len(rotations.heads):
        raise ModelError(
            asked=f"{len(rotations.heads)} rotations of heads, one a layer",
            found=f"{len(layers)} layers",
            why="each layer's values are rotated by its own matrix",
            todo="choose the rotations for this model, or none",
        )
    for layer, rotation in zip(layers, rotations.heads, strict=True):
        rotate_heads_(layer, family, rotation, head_width(model))


@torch.no_grad()
def fold_norms_(model: nn.Module, family: Family) -> None:
    """Move each RMSNorm's gain into the columns of the linears that read it; it becomes 1.

    The final norm's gain goes into the head. A head that shares its weight with the embedding gets
    one of its own first, and the configuration says so.

    Raises:
        ModelError: a norm is not x gain / rms(x).
    """
    for norm in stream_norms(model, family):  # all of them, before the first change
        require_rms_norm(norm)
    _untie_(model, family)
    for norm in stream_norms(model, family):
        gain = rms_gain(norm.module)
        for weight in norm.readers:
            for rows in weight.split(_ROWS):
                rows.copy_(rows.double() * gain.double())
        gain.fill_(1.0)


@torch.no_grad()
def rotate_residual_(model: nn.Module, family: Family, rotation: Rotation) -> None:
    """Put the residual stream into the coordinates h R.

    Raises:
        ModelError: a gain is not 1 (`fold_norms_` comes first), or the width is another one.
    """
    embedding = model.get_submodule(family.embedding)
    head = linear_at(model, family.head)
    assert isinstance(embedding, nn.Embedding)
    if embedding.embedding_dim != rotation.width:
        raise ModelError(
            asked=f"a rotation of {rotation.width} features of the residual stream",
            found=f"{embedding.embedding_dim} features",
            why="each hidden state is multiplied by the whole matrix",
            todo="choose the rotation for this model",
        )
    norms = stream_norms(model, family)
    unfolded = [norm.name for norm in norms if not bool((rms_gain(norm.module) == 1).all())]
    if unfolded or head.weight is embedding.weight:
        raise ModelError(
            asked="a rotated residual stream",
            found=f"a gain in {unfolded[0]}" if unfolded else "a head tied to the embedding",
            why="a gain per channel does not commute with a rotation",
            todo="call `fold_norms_` first",
        )
    _rotate_rows_(embedding.weight, rotation)
    for norm in norms:
        for weight in norm.readers:
            _rotate_rows_(weight, rotation)
    for layer in model.get_submodule(family.layers).children():
        for path in family.residual_writers:
            _rotate_outputs_(linear_at(layer, path), rotation)


@torch.no_grad()
def rotate_heads_(layer: nn.Module, family: Family, rotation: Rotation, head_dim: int) -> None:
    """Rotate the values of every head of a layer, and o_proj's input columns to match.

    Raises:
        ModelError: the rotation is not of ``head_dim`` features, or heads are not of that size.
    """
    site = family.site(SiteName.O_IN)
    values, readers = linear_at(layer, site.source), [linear_at(layer, p) for p in site.linears]
    widths = [values.out_features, *(linear.in_features for linear in readers)]
    if rotation.width != head_dim or any(width % head_dim for width in widths):
        raise ModelError(
            asked=f"a rotation of {rotation.width} features of heads of {head_dim}",
            found=f"{site.source} with {widths[0]} outputs, read as {widths[1]}",
            why="each head is rotated by itself",
            todo="pass the model's head_dim and a rotation of that size",
        )
    _rotate_outputs_(values, rotation)
    for linear in readers:
        _rotate_rows_(linear.weight, rotation)


@torch.no_grad()
def round_kept_(model: nn.Module, linears: set[str]) -> None:
    """Round every parameter to BF16 values, in its own dtype, but for the weights of ``linears``.

    A checkpoint keeps what is not quantized in BF16, and the model in memory has to be what is
    written. As read, all parameters are BF16 values; after a rotation the embedding, the head, the
    biases and the weights that stay unquantized are not, where the model computes in float32. The
    weights of ``linears`` (full names) are left alone: they become MXFP4 codes, and rounding them
    to BF16 before would round twice.
    """
    exempt = {f"{name}.weight" for name in linears}
    for name, parameter in model.named_parameters():
        if name not in exempt and parameter.is_floating_point():
            parameter.copy_(parameter.bfloat16())


def head_width(model: nn.Module) -> int:
    """Features of an attention head; Qwen3's are not hidden size / heads."""
    config: Any = model.config
    return int(getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads)


def _untie_(model: nn.Module, family: Family) -> None:
    head, embedding = linear_at(model, family.head), model.get_submodule(family.embedding)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _rotate_rows_(weight: Float[Tensor, "rows d"], rotation: Rotation) -> None:
    """Each row, in pieces of the rotation's width: w becomes w R."""
    there = rotation.to(weight.device)
    for rows in weight.split(_ROWS):
        pieces = rows.double().unflatten(-1, (-1, rotation.width))
        rows.copy_(there.apply(pieces).flatten(-2))


def _rotate_outputs_(linear: nn.Linear, rotation: Rotation) -> None:
    """Outputs y become y R, again in pieces: weight R^T W, bias b R."""
    _rotate_rows_(linear.weight.T, rotation)
    if linear.bias is not None:
        _rotate_rows_(linear.bias[None], rotation)
