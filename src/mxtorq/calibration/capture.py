"""Run a model layer by layer and record what reaches each input site.

The model's own forward pass is stopped at its first decoder layer, which yields the arguments that
every layer takes (positions, masks); from there each layer is called by itself. So one layer at a
time needs to be at hand, and the output of the *quantized* layer can feed the next.

Of several ranks each runs the batches that are its own, and they sum up together. Where the sums
shall be exact, the ranks take their steps together and hand each other what the sites got.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from mxtorq.calibration.statistics import (
    Pair,
    PairAccumulator,
    SiteAccumulator,
    SplitAccumulator,
)
from mxtorq.models.family import Family, Site
from mxtorq.ranks import SOLO, Ranks
from mxtorq.transforms.base import SiteStatistics

_Accumulator = TypeVar("_Accumulator", bound=SiteAccumulator | SplitAccumulator | PairAccumulator)

BATCH_TOKENS = 4096
"""Tokens a forward pass works on, at least one window."""


class LayerInput:
    """The hidden states of one batch of windows and the other arguments of a layer call."""

    def __init__(
        self, hidden: Float[Tensor, "windows seqlen d"], arguments: dict[str, Any]
    ) -> None:
        self.hidden = hidden
        self.arguments = arguments

    @property
    def tokens(self) -> int:
        """How many they are of."""
        return self.hidden.shape[:-1].numel()

    def first(self, tokens: int) -> "LayerInput":
        """The same of the first windows alone, which other arguments do not tell apart.

        ``tokens`` is how many they have together at most; it is one window at least.
        """
        hidden = self.hidden  # may be read from disk
        windows = max(1, tokens // hidden.shape[1])
        return LayerInput(hidden[:windows], _cut(self.arguments, len(hidden), windows))


class _Stop(Exception):
    """Ends a forward pass once the first layer's arguments are known."""


def batches(windows: Int64[Tensor, "n seqlen"], least: int = 1) -> list[Int64[Tensor, "b seqlen"]]:
    """Windows in groups of about `BATCH_TOKENS` tokens, ``least`` of them if there are as many
    windows."""
    some = min(len(windows) // least, BATCH_TOKENS // windows.shape[1])
    return list(windows.split(max(1, some)))


def first_layer_inputs(
    model: nn.Module,
    family: Family,
    windows: Int64[Tensor, "n seqlen"],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> list[LayerInput]:
    """All of `each_first_input`."""
    return list(each_first_input(model, family, windows, device, dtype))


@torch.no_grad()
def each_first_input(
    model: nn.Module,
    family: Family,
    windows: Int64[Tensor, "n seqlen"],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    ranks: Ranks = SOLO,
    least: int = 1,
) -> Iterator[LayerInput]:
    """What the first decoder layer receives for each batch of windows, one batch after the other.

    ``device`` and ``dtype`` are those that the layers compute on and in; the embedding's own unless
    given. Of the model's weights only the embedding is used. Batches of one shape share the other
    arguments, which are the same. Of several ranks each gets every ``size``-th batch.
    ``least`` as in `batches`.
    """
    first = model.get_submodule(f"{family.layers}.0")
    embedding: Any = model.get_submodule(family.embedding)
    device, dtype = device or embedding.weight.device, dtype or embedding.weight.dtype
    caught: list[LayerInput] = []
    shared: dict[torch.Size, dict[str, Any]] = {}

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(LayerInput(args[0], kwargs))
        raise _Stop

    for batch in batches(windows, least)[ranks.rank :: ranks.size]:
        hook = first.register_forward_pre_hook(catch, with_kwargs=True)
        cast = embedding.register_forward_hook(lambda module, args, output: output.to(dtype))
        try:
            model(input_ids=batch.to(device), use_cache=False)
        except _Stop:
            pass
        finally:
            hook.remove()
            cast.remove()
        item = caught.pop()
        common = shared.setdefault(item.hidden.shape, item.arguments)
        if _same(common, item.arguments):
            item.arguments = common
        yield item


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or bool(one == other)


def _cut(value: Any, count: int, windows: int) -> Any:
    """What has a row for each of ``count`` windows, all of them alike, with fewer rows."""
    if isinstance(value, Tensor):
        of_each = value.ndim > 1 and len(value) == count
        return value[:windows] if of_each and bool((value == value[:1]).all()) else value
    if isinstance(value, dict):
        return {key: _cut(each, count, windows) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(each, count, windows) for each in value)
    return value


@torch.no_grad()
def capture_sites(
    layer: nn.Module,
    sites: dict[str, Site],
    inputs: Sequence[LayerInput],
    seed: int,
    *,
    hessians: bool = True,
    ranks: Ranks = SOLO,
) -> dict[str, SiteStatistics]:
    """Run a layer over all inputs and sum up what reaches each site.

    Args:
        layer: the decoder layer, unquantized.
        sites: the sites to record, by full name.
        inputs: the layer's inputs, those of this rank; left as they are.
        seed: of the token sample, the same tokens at every site.
        hessians: sum up second moments too.
        ranks: who sums up together.

    Raises:
        ModelError: an activation is NaN or Inf.
    """
    accumulators = _record(
        layer,
        sites,
        inputs,
        lambda name, width, tokens: SiteAccumulator(name, width, tokens, seed, hessians, ranks),
        ranks,
    )
    return {
        name: accumulators[name].finish(site.name, reader_weights(layer, site))
        for name, site in sites.items()
    }


@torch.no_grad()
def capture_split(
    layer: nn.Module,
    sites: dict[str, Site],
    inputs: Sequence[LayerInput],
    seed: int,
    held_out: int,
    ranks: Ranks = SOLO,
) -> dict[str, tuple[SiteStatistics, SiteStatistics]]:
    """As `capture_sites`, of all but the last tokens and of these ``held_out`` ones alone.

    Raises:
        ModelError: an activation is NaN or Inf.
    """

    def make(name: str, width: int, tokens: int) -> SplitAccumulator:
        last = held_out * sites[name].passes
        return SplitAccumulator(name, width, tokens, last, seed, ranks=ranks)

    accumulators = _record(layer, sites, inputs, make, ranks)
    return {
        name: accumulators[name].finish(site.name, reader_weights(layer, site))
        for name, site in sites.items()
    }


@torch.no_grad()
def capture_hessians(
    layer: nn.Module,
    sites: dict[str, Site],
    inputs: Sequence[LayerInput],
    through: Mapping[str, Callable[[Tensor], Tensor]],
    ranks: Ranks = SOLO,
) -> dict[str, Float64[Tensor, "d d"]]:
    """The second moment of what reaches each site after a function of the site's own.

    Raises:
        ModelError: an activation is NaN or Inf.
    """
    accumulators = _record(
        layer,
        sites,
        inputs,
        lambda name, width, tokens: SiteAccumulator(name, width, tokens, 0, ranks=ranks),
        ranks,
        through,
    )
    return {name: accumulator.take_hessian() for name, accumulator in accumulators.items()}


@torch.no_grad()
def capture_pairs(
    layer: nn.Module,
    sites: dict[str, Site],
    inputs: Sequence[LayerInput],
    size: int,
    both: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]],
    ranks: Ranks = SOLO,
) -> dict[str, list[Pair]]:
    """What a function of each site makes of its inputs, before and after a change: the moments of
    what is after it, and across, in blocks of ``size`` channels. The last has what is left.

    Raises:
        ModelError: an activation is NaN or Inf.
    """
    accumulators = _record(
        layer,
        sites,
        inputs,
        lambda name, width, _: PairAccumulator(name, width, size, both[name], ranks),
        ranks,
    )
    return {name: accumulator.finish() for name, accumulator in accumulators.items()}


def reader_weights(layer: nn.Module, site: Site) -> tuple[Tensor, ...]:
    """The weights of a site's linears, as they are in the module."""
    weights = (layer.get_submodule(path).weight for path in site.linears)
    return tuple(weight.detach() for weight in weights if isinstance(weight, Tensor))


@torch.no_grad()
def advance_(layer: nn.Module, inputs: Sequence[LayerInput]) -> None:
    """Replace each input's hidden states by the layer's output."""
    for item in inputs:
        output = layer(item.hidden, **item.arguments)
        item.hidden = output[0] if isinstance(output, tuple) else output  # older transformers


class Turn(NamedTuple):
    """A step that the ranks take together, each with a batch of its own."""

    item: LayerInput | None
    """This rank's; None where the batches end before the ranks do."""
    before: int
    """Tokens of the text before it."""


def turns(inputs: Sequence[LayerInput], ranks: Ranks) -> tuple[Iterator[Turn], int]:
    """The batches of this rank, as many steps as every other one has, and all tokens of all.

    A batch is taken from ``inputs`` when its turn comes, so that whoever iterates over them can
    tell how long each took.
    """
    counts = ranks.all_json([item.tokens for item in inputs])
    return _turns(inputs, counts, ranks.rank), sum(map(sum, counts))


def _turns(inputs: Sequence[LayerInput], counts: list[list[int]], rank: int) -> Iterator[Turn]:
    before, mine = 0, iter(inputs)
    for step in range(max(map(len, counts))):
        sizes = [sum(count[step : step + 1]) for count in counts]
        yield Turn(next(mine, None), before + sum(sizes[:rank]))
        before += sum(sizes)
    next(mine, None)  # says that the last one is done


def _record(
    layer: nn.Module,
    sites: dict[str, Site],
    inputs: Sequence[LayerInput],
    make: Callable[[str, int, int], _Accumulator],
    ranks: Ranks,
    through: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, _Accumulator]:
    """``make`` gives a site's accumulator from its name, its width and how many inputs it will
    have; ``through`` is what is done to them before it gets them."""
    looks = through or {}
    steps, tokens = turns(inputs, ranks)
    widths = {name: reader_weights(layer, site)[0].shape[1] for name, site in sites.items()}
    accumulators = {
        name: make(name, widths[name], tokens * site.passes) for name, site in sites.items()
    }
    heard: dict[str, list[Tensor]] = {name: [] for name in sites}  # in a step that is exact

    def recorder(name: str) -> Any:
        seen = looks.get(name, lambda values: values)
        take = heard[name].append if ranks.exact else accumulators[name].add
        return lambda module, args: take(seen(args[0]))

    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(recorder(name))
        for name, site in sites.items()
        for path in site.taps
    ]
    try:
        for item, before in steps:
            for name, site in sites.items():
                if not ranks.exact:
                    accumulators[name].seek(before * site.passes)
            if item is not None:
                layer(item.hidden, **item.arguments)
            for name in sites:
                if ranks.exact:  # call by call, in the order of one process
                    for rows in ranks.gather(heard[name]):
                        accumulators[name].add(rows)
                    heard[name].clear()
    finally:
        for hook in hooks:
            hook.remove()
    for accumulator in accumulators.values():
        accumulator.join_()
    return accumulators
