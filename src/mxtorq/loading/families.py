"""Which family a model or a checkpoint is of: one that mxtorq knows, or the caller's own.

A family of the caller's own is an object, and its name is all that a checkpoint keeps of it. So the
name must not be one of ours with another meaning, and whoever loads the checkpoint passes the
object again. What it says of a model is tried out before any work.
"""

from collections.abc import Mapping

from torch import nn

from mxtorq.errors import CheckpointError, ModelError, UsageError
from mxtorq.models import FAMILIES
from mxtorq.models.family import Family, find_family
from mxtorq.surgery.linear import linear_at


def choose_family(config: Mapping[str, object], own: Family | None) -> Family:
    """The family of a model by its config.json, or the caller's own.

    Raises:
        ModelError: no family is of this ``model_type``, or the caller's is of another.
        UsageError: the caller's has the name of another one of ours.
    """
    if own is None:
        return find_family(config, FAMILIES)
    if FAMILIES.get(own.name, own) != own:
        raise UsageError(
            asked=f"a family of your own with the name {own.name!r}",
            found=f"mxtorq's family {own.name!r}, which is described otherwise",
            why="a checkpoint keeps the name alone, and would be loaded as the other one",
            todo="give yours another name",
        )
    if config.get("model_type") != own.model_type:
        raise ModelError(
            asked=f"a model of the family {own.name!r}, of type {own.model_type!r}",
            found=f"a model of type {config.get('model_type')!r}",
            why="its modules have the names of another architecture",
            todo="pass the family that describes this model, or none",
        )
    return own


def family_again(config: Mapping[str, object], name: str, own: Family | None) -> Family:
    """The family of a checkpoint whose manifest names it.

    Raises:
        CheckpointError: it is none of ours and was not passed.
        UsageError: another one was passed.
    """
    if own is None and name not in FAMILIES:
        raise CheckpointError(
            asked="a checkpoint loaded by itself",
            found=f"a model of the family {name!r}, which is none of {', '.join(FAMILIES)}",
            why="it was quantized with a family of its maker's own, and a checkpoint keeps no more "
            "of that than its name",
            todo="pass the family again: mxtorq.load(path, family=...), or on the command line "
            "--family package.module:NAME",
        )
    family = choose_family(config, own)
    if family.name != name:
        raise UsageError(
            asked=f"a checkpoint loaded as a model of the family {family.name!r}",
            found=f"one of the family {name!r}",
            why="it has to be built as it was when it was quantized",
            todo=f"pass the family {name!r}" + ("" if name not in FAMILIES else ", or none"),
        )
    return family


def require_described(model: nn.Module, family: Family) -> None:
    """Refuse a family that names modules which a model does not have.

    Raises:
        ModelError: one is missing, or is no linear where that is needed.
    """
    modules = [family.embedding, family.rotary, family.final_norm]
    linears = [family.head]
    try:
        for index in range(len(list(model.get_submodule(family.layers).children()))):
            for site in family.sites:
                paths = (*site.sources, *site.kept_readers, *site.taps)
                modules += [family.linear_name(index, path) for path in paths]
                linears += [family.linear_name(index, path) for path in site.linears]
            linears += [family.linear_name(index, path) for path in family.residual_writers]
        for path in modules:
            model.get_submodule(path)
        for path in linears:
            linear_at(model, path)
    except AttributeError as error:
        raise ModelError(
            asked=f"a {type(model).__name__} as one of the family {family.name!r}",
            found=str(error),
            why="every module that a family names must be there",
            todo="compare the family with `print(model)`; the families in mxtorq/models are "
            "examples",
        ) from error
