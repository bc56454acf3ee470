"""What a decoder layer gets, batch by batch: in memory, on disk, or both.

A run that may be killed writes the hidden states behind each layer to disk, so that it can go on
from there; one that may not take much memory reads them back from there when they are needed. Both
are `StoredInput`: a file for each batch and layer, named when the disk has it. The file of the
layer before stays until somebody says that the layer is finished.

The bits are the same either way: a file that is read is hashed the first time, and has to be the
same file each further time. What an earlier process wrote was hashed against its record already.
The price is one write of tokens x width numbers a layer, and one read for each pass over a layer
when the states do not stay in memory.
"""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mxtorq.calibration.capture import LayerInput
from mxtorq.errors import CheckpointError
from mxtorq.ranks import SOLO, Ranks
from mxtorq.reading.documents import Refusal
from mxtorq.reading.shards import Shards, open_file
from mxtorq.writing import fingerprint, write_tensors

_REFUSE = Refusal(
    kind=CheckpointError,
    asked="the activations of an unfinished run",
    why="they are not as this run wrote them",
    todo="remove the folder of the unfinished run to start again",
)


class StoredInput(LayerInput):
    """One batch of what a layer gets; assigning to ``hidden`` writes what the next layer gets."""

    def __init__(
        self, folder: Path, number: int, first: LayerInput, layer: int, *, keep: bool
    ) -> None:
        """Args:
        folder: of the files.
        number: of the batch.
        first: the batch as the first layer gets it.
        layer: whose input it stands for; a later layer's is read from its file.
        keep: hold the states in memory as well.
        """
        self._folder, self._number, self._layer, self._keep = folder, number, layer, keep
        self._shape, self._dtype = first.hidden.shape, first.hidden.dtype
        self._device = first.hidden.device
        self.arguments = first.arguments
        self.facts: dict[str, Any] = {}
        """``sha256`` and ``bytes`` of the file that was written last."""
        self._value: Tensor | None = None
        self._file: Shards | None = None
        if layer == 0 and keep:
            self._value = first.hidden
        elif layer == 0:
            self._write(first.hidden)
        elif keep:
            self._value = self._read()

    @property
    def path(self) -> Path:
        """The file of these states. The first layer's have one only if they are not in memory."""
        return self._folder / f"{self._layer:05d}-{self._number:05d}.safetensors"

    @property
    def tokens(self) -> int:
        return self._shape[:-1].numel()

    @property
    def hidden(self) -> Float[Tensor, "windows seqlen d"]:
        """The states, from memory or from disk.

        Raises:
            CheckpointError: the file is not as it was written.
        """
        return self._read() if self._value is None else self._value

    @hidden.setter
    def hidden(self, value: Float[Tensor, "windows seqlen d"]) -> None:
        self._layer += 1
        self._value = value if self._keep else None
        self._write(value)

    def _write(self, value: Tensor) -> None:
        self.facts, self._file = write_tensors(self.path, {"hidden": value}), None

    def _read(self) -> Tensor:
        if self._file is None:
            self._file = self._opened()
        return self._file.tensor("hidden").to(self._device)

    def _opened(self) -> Shards:
        """The file, its bytes checked once; later reads notice when it is another one."""
        opened = open_file(self.path, _REFUSE)
        found = opened.entry("hidden")
        if (found.shape, found.dtype) != (tuple(self._shape), self._dtype):
            raise _REFUSE(
                f"{self.path.name} of {found.dtype} {found.shape}, not {self._dtype} "
                f"{tuple(self._shape)}"
            )
        if self.facts and fingerprint(self.path) != self.facts:
            raise _REFUSE(f"{self.path.name} with other bytes than were written")
        return opened


def stored_inputs(
    first: Iterator[LayerInput],
    folder: Path,
    layer: int,
    tokens: int,
    memory: int,
    ranks: Ranks = SOLO,
) -> list[StoredInput]:
    """What a layer gets, from what the first one gets and from the files of an earlier process.

    Args:
        first: each batch as the first layer gets it; of several ranks, each of this one's.
        folder: of the files.
        layer: whose input is wanted.
        tokens: of all batches.
        memory: bytes up to which all batches together stay in memory, those of all ranks.
        ranks: who has which batches; files are named by the number among those of all.

    Raises:
        CheckpointError: a file is missing or is not as it was written.
        OSError: the disk is full or refuses.
    """
    stored: list[StoredInput] = []
    for number, batch in zip(count(ranks.rank, ranks.size), first):
        needed = tokens * batch.hidden.shape[-1] * batch.hidden.element_size()
        stored.append(StoredInput(folder, number, batch, layer, keep=needed <= memory))
    return stored
