"""Several processes that quantize one model together, and what they say to each other.

    torchrun --nproc-per-node 8 -m mxtorq quantize MODEL OUT
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m ...

Every rank runs the same program. Batch b of the calibration belongs to rank b % size; a site, or an
expert at a site, belongs to one rank that chooses its transform or its codes and gives them to all,
so that each has the whole quantized layer in front of it when the next one comes. Rank 0 leads: it
alone holds the lock, the log and the record of a run, and it alone writes and verifies the
checkpoint. The other ranks write the activations of their own batches, so all of them have to see
the folder of OUT: on several machines it lies on a shared file system.

`Ranks` has the few operations that this takes, and `SOLO`, one process by itself, for which each of
them gives back what it was given: whoever uses them has one path. Numbers go as JSON and tensors as
their bytes; torch's own operations on objects would pickle. Tensors travel on the device that
computes (NCCL on CUDA), all else between the CPUs (gloo).

A rank that ends closes its connections. The others notice in the operation that they are in or at
the next one, and end with a `RankError`. A machine that loses its power closes nothing; what starts
the ranks has to notice that. Time alone ends nothing before half a day: ranks wait for each other
while one of them rounds or writes.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mxtorq.errors import RankError

_PATIENCE = timedelta(hours=12)
"""How long a rank waits for the others."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One of the processes that work together; every one has to call the same operations."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    """Where this one computes."""
    exact: bool = False
    """Whether sums over tokens shall be those of one process to the bit."""

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on this one's device; ``values`` may be overwritten."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max_(self, values: Tensor) -> Tensor:
        """Likewise the maximum of each element."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of all ranks, those of rank 0 first; shapes and types may differ.

        All of them on this one's device; of one process alone as they are.
        """
        if self.size == 1:
            return list(parts)
        found: list[Tensor] = []
        forms = self.all_json([[str(p.dtype).removeprefix("torch."), [*p.shape]] for p in parts])
        for owner, entries in enumerate(forms):
            if owner == self.rank:
                self._broadcast(_bytes_of(parts, self.device), owner)
                found += [part.to(self.device) for part in parts]
            else:
                likes = [torch.empty(s, dtype=getattr(torch, t), device="meta") for t, s in entries]
                count = sum(like.numel() * like.element_size() for like in likes)
                data = torch.empty(count, dtype=torch.uint8, device=self.device)
                found += _tensors_of(self._broadcast(data, owner), likes)
        return found

    def all_tensors(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The named tensors of all ranks; no two ranks have one of the same name."""
        names = [name for each in self.all_json(list(mine)) for name in each]
        return dict(zip(names, self.gather(list(mine.values())), strict=True))

    def tensors_from_leader(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The leader's named tensors; what another rank passes is not looked at."""
        return self.all_tensors(tensors if self.leads else {})

    def all_json(self, value: Any) -> list[Any]:
        """The value of each rank, in their order: what JSON can say."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        lengths = self._all_gathered(torch.tensor([len(text)]))
        data = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = zip(self._all_gathered(data), lengths, strict=True)
        return [json.loads(bytes(each[: int(length)].numpy())) for each, length in texts]

    def json_from_leader(self, value: Any) -> Any:
        """The leader's value; what another rank passes is not looked at."""
        return self.all_json(value if self.leads else None)[0]

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.all_json(None)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The others enter the block when the leader has left it.

        What is refused there is refused once, and what is downloaded there is downloaded once.
        """
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        if self.size == 1:
            return values
        values = values.to(self.device).contiguous()
        if values.numel():
            with self._together():
                dist.all_reduce(values, how)
        return values

    def _broadcast(self, data: Tensor, owner: int) -> Tensor:
        if len(data):
            with self._together():
                dist.broadcast(data, owner)
        return data

    def _all_gathered(self, values: Tensor) -> list[Tensor]:
        found = [torch.empty_like(values) for _ in range(self.size)]
        if values.numel():
            with self._together():
                dist.all_gather(found, values)
        return found

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what gloo and NCCL raise, without a class of its own
            raise self._alone(error) from error

    def _alone(self, error: Exception) -> RankError:
        lines = str(error).splitlines() or [""]
        return RankError(
            asked=f"rank {self.rank} of {self.size} to work together with the other ranks",
            found=f"{type(error).__name__}: {lines[0]:.300}",
            why=ANOTHER_ENDED,
            todo="look at the message of the rank that ended first, and run the same command "
            "again, with as many ranks as you like: it goes on after the last finished layer",
        )


ANOTHER_ENDED = "another rank ended, and one alone cannot go on"
"""Why a rank ends that did nothing wrong itself."""

SOLO = Ranks()
"""One process that works by itself."""


@contextmanager
def ranks_from_environment(device: torch.device, *, exact: bool = False) -> Iterator[Ranks]:
    """The group that ``torchrun`` has started this process for; one by itself without torchrun.

    Args:
        device: where it computes; of several accelerators each rank of a machine takes its own.
        exact: see `Ranks.exact`.

    Raises:
        RankError: the ranks cannot reach each other.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(device=device)
        return
    backend = "gloo"
    if device.type != "cpu":
        if device.index is None:
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.accelerator.set_device_index(device)
        own = dist.get_default_backend_for_device(device.type)
        backend = f"cpu:gloo,{device.type}:{own}"
    ranks = Ranks(rank=rank, size=size, device=device, exact=exact)
    with ranks._together():
        dist.init_process_group(backend, timeout=_PATIENCE)
    ended_well = False
    try:
        yield ranks
        ended_well = True
    finally:
        # NCCL would wait for what the ranks that are gone had begun; the process ends anyhow.
        if ended_well or device.type == "cpu":
            dist.destroy_process_group()


def shares(costs: Sequence[int], size: int) -> list[int]:
    """Which of ``size`` ranks does what, by the cost of each: the dearest first, to the idlest."""
    owners, loads = [0] * len(costs), [0] * size
    for at in sorted(range(len(costs)), key=lambda at: -costs[at]):
        owners[at] = loads.index(min(loads))
        loads[owners[at]] += costs[at]
    return owners


def _bytes_of(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    none = torch.empty(0, dtype=torch.uint8, device=device)
    flat = [part.detach().to(device).contiguous().flatten().view(torch.uint8) for part in parts]
    return torch.cat([none, *flat])


def _tensors_of(data: Tensor, likes: Sequence[Tensor]) -> list[Tensor]:
    pieces = data.split([like.numel() * like.element_size() for like in likes])
    # Each in aligned memory of its own, as if it had been computed here.
    return [
        piece.clone().view(like.dtype).view(like.shape)
        for piece, like in zip(pieces, likes, strict=True)
    ]
