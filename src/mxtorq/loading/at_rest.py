"""A model that stays on disk: a decoder layer is read one ahead of the work, and let go after it.

What is in memory is at most two layers, one that is worked on and one that is coming, and the
embedding while the text goes through it. The final norm and the head are never read, only copied
into the checkpoint. A model that is in memory as a whole, because its weights were changed as a
whole, goes through the same functions.

Where the model computes in float32, the weights of a layer's linears stay in BF16 as they are
stored, and are widened for each call (`StoredLinear`): half of the memory for a copy a call.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mxtorq.errors import ModelError
from mxtorq.loading.skeleton import empty_, fill_
from mxtorq.loading.source import Source
from mxtorq.surgery.linear import StoredLinear, linear_at

_NUMBERS = 2**22  # that are read and looked at together


def stored_value(source: Source, name: str) -> Tensor:
    """A tensor of the unquantized model in BF16, on the CPU.

    Raises:
        ModelError: it holds NaN or Inf.
    """
    return _put_(torch.empty(_shape(source, name), dtype=torch.bfloat16), source, name)


def stored_parts(source: Source, name: str) -> Iterator[tuple[slice, Tensor]]:
    """`stored_value`, some rows at a time: an embedding is too large to be read twice at once.

    Raises:
        ModelError: it holds NaN or Inf.
    """
    parameter = source.model.get_parameter(name)
    length, total = len(parameter), parameter.numel()
    step = max(1, _NUMBERS * length // max(1, total))
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        if source.shards is None:
            yield rows, parameter.detach()[rows].bfloat16().cpu()
            continue
        part = source.shards.tensor(name, rows).to(torch.bfloat16)
        if not _is_finite(part):
            raise ModelError(
                asked=f"the model {source.name!r}",
                found=f"NaN or Inf in {name} (after rounding to BF16)",
                why="a block with one such weight would become NaN as a whole",
                todo="get an undamaged copy of the weights",
            )
        yield rows, part


def _is_finite(values: Tensor) -> bool:
    """Whether no BF16 number has all bits of its exponent set; `torch.isfinite` takes ten times
    as long."""
    return int((values.view(torch.int16) & 0x7FFF).amax()) < 0x7F80


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
            if source.dtype != torch.bfloat16:
                keep_stored_(layers[index])
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


def keep_stored_(layer: nn.Module) -> None:
    """Let the linears of a layer without values keep what they are given in BF16."""
    linears = [path for path, part in layer.named_modules() if type(part) is nn.Linear]
    for path in linears:
        layer.set_submodule(path, StoredLinear.like(linear_at(layer, path)))


def _read_(source: Source, prefix: str, dtype: torch.dtype) -> None:
    names = [name for name, _ in source.model.named_parameters() if name.startswith(prefix)]

    places = _places(source, names)

    def read(name: str) -> Tensor:
        if name in places:
            return _put_(places[name], source, name)
        return stored_value(source, name).to(source.device, dtype)

    fill_(source.model, names, read)


def _places(source: Source, names: list[str]) -> dict[str, Tensor]:
    """Memory for the weights that stay in BF16: one piece for all experts' linears of a name.

    Hundreds of pieces of a few MB would come from the heap, which keeps what is given back to it
    between others; one large piece is the operating system's again when its last weight is gone.
    """
    together: dict[str, list[str]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and isinstance(source.model.get_submodule(path), StoredLinear):
            together.setdefault(path.rpartition(".")[2], []).append(name)
    places = {}
    for alike in together.values():
        sizes = [_shape(source, name).numel() for name in alike]
        piece = torch.empty(sum(sizes), dtype=torch.bfloat16, device=source.device)
        for name, part in zip(alike, piece.split(sizes), strict=True):
            places[name] = part.view(_shape(source, name))
    return places


def _put_(place: Tensor, source: Source, name: str) -> Tensor:
    for rows, part in stored_parts(source, name):
        place[rows] = part
    return place


def _shape(source: Source, name: str) -> torch.Size:
    return source.model.get_parameter(name).shape
