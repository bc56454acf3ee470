"""A model that stays on disk: a decoder layer is read one ahead of the work, and let go after it.

What is in memory is at most two layers, one that is worked on and one that is coming, and the
embedding while the text goes through it. The final norm and the head are never read, only copied
into the checkpoint. A model that is in memory as a whole, because its weights were changed as a
whole, goes through the same functions.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mxtorq.errors import ModelError
from mxtorq.loading.skeleton import empty_, fill_
from mxtorq.loading.source import Source


def stored_value(source: Source, name: str) -> Tensor:
    """A tensor of the unquantized model in BF16, on the CPU.

    Raises:
        ModelError: it holds NaN or Inf.
    """
    if source.shards is None:
        return source.model.get_parameter(name).detach().bfloat16().cpu()
    value = source.shards.tensor(name).to(torch.bfloat16)
    if not bool(torch.isfinite(value).all()):
        raise ModelError(
            asked=f"the model {source.name!r}",
            found=f"NaN or Inf in {name} (after rounding to BF16)",
            why="a block with one such weight would become NaN as a whole",
            todo="get an undamaged copy of the weights",
        )
    return value


@contextmanager
def embedded(source: Source) -> Iterator[None]:
    """The embedding is in memory while this lasts."""
    if source.shards is None:
        yield
        return
    _read_(source, f"{source.family.embedding}.", torch.bfloat16)
    try:
        yield
    finally:
        empty_(source.model.get_submodule(source.family.embedding))


def staged_(source: Source, start: int = 0) -> Iterator[tuple[int, nn.Module]]:
    """Each decoder layer from ``start`` with its index, once it lies where it computes.

    The next one is read while it is worked on.
    """
    family, model = source.family, source.model
    layers = list(model.get_submodule(family.layers).children())

    def arrive_(index: int) -> nn.Module:
        if source.shards is not None:
            _read_(source, f"{family.layers}.{index}.", source.dtype)
        return layers[index]

    with ThreadPoolExecutor(1, thread_name_prefix="mxtorq-layers") as reader:
        order = range(start, len(layers))
        coming = [reader.submit(arrive_, index) for index in order[:1]]
        for index in order:
            layer = coming.pop().result()
            if index + 1 < len(layers):
                coming.append(reader.submit(arrive_, index + 1))
            yield index, layer


def _read_(source: Source, prefix: str, dtype: torch.dtype) -> None:
    names = [name for name, _ in source.model.named_parameters() if name.startswith(prefix)]
    fill_(source.model, names, lambda name: stored_value(source, name).to(source.device, dtype))
