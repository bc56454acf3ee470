"""What a run needs beside what the machine has, and the refusal where that is more.

The figures are those of buffers as large as weights, activations and Hessians (`memory`, `disk`),
and a run is refused only where they do not fit: a machine that is close to its limit may still
fail. Nothing is adjusted. What would fit is named, each with its own figure, computed by the same
functions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from mxtorq.calibration.data import Windows
from mxtorq.config import Recipe, method_name, rounding_name
from mxtorq.errors import UsageError
from mxtorq.export.output import bytes_below, finished_layers, partial_folder
from mxtorq.loading.source import Source
from mxtorq.machine import (
    free_device_memory,
    free_disk,
    free_memory,
    resident_memory,
)
from mxtorq.preflight import disk, memory, probe
from mxtorq.preflight.job import Job, job_of
from mxtorq.reports.needs import Budget, Needs, in_units
from mxtorq.rounding.rtn import RTN
from mxtorq.transforms.hadamard import Hadamard

_SHARE = 4
"""Activations stay in memory unless told otherwise if they fit into a quarter of it."""


class Machine:
    """What there is, looked up once."""

    def __init__(self, source: Source, out: Path) -> None:
        accelerator = source.device.type != "cpu"
        self.resident, self.memory = resident_memory(), free_memory()
        self.device = free_device_memory(source.device) if accelerator else None
        self.disk, self.written = free_disk(out.absolute().parent), bytes_below(partial_folder(out))

    @property
    def compute(self) -> int:
        """Bytes that may still be taken where it computes."""
        return self.memory if self.device is None else self.device


def needs(
    source: Source,
    recipe: Recipe,
    windows: Windows,
    unfit: Mapping[str, int],
    out: Path,
    activation_memory: int | None = None,
    *,
    measured: bool = False,
) -> Needs:
    """What a run will need, from shapes, and from a probe if one is asked for.

    The probe is left out where something does not fit, and where a run goes on.

    Args:
        source: the model, best at rest.
        recipe: how.
        windows: what it is calibrated on.
        unfit: sites that stay in BF16.
        out: where to.
        activation_memory: bytes up to which activations stay in memory. Unless given, what the rest
            leaves free, and at most a quarter of the free memory.
        measured: measure how long the first layer takes.

    Raises:
        MxtorqError: what the run itself would raise at its first layer.
    """
    job, machine = job_of(source, recipe, windows, unfit), Machine(source, out)
    if activation_memory is None:
        rest = compute_budget(job, machine, 0)
        activation_memory = max(0, min(machine.compute // _SHARE, rest.free - rest.needed))
    budgets = every_budget(job, machine, activation_memory)
    short = [budget for budget in budgets if not budget.fits]
    finished = finished_layers(out)
    seconds = None
    if measured and not short and not finished:
        pace = probe.measure(source, recipe, windows, unfit)
        seconds = pace.seconds(job.layers, job.batches)
    return Needs(
        model=source.name,
        out=str(out),
        device=str(source.device),
        budgets=tuple(budgets),
        activation_memory=activation_memory,
        layers=job.layers,
        finished=finished,
        seconds=seconds,
        changes=tuple(
            change
            for budget in short
            for change in changes(job, machine, activation_memory, budget)
        ),
        notes=tuple(_notes(recipe)),
    )


def require(needs: Needs) -> None:
    """Refuse what does not fit, with what would.

    Raises:
        UsageError: more is needed than there is.
    """
    for budget in needs.budgets:
        if not budget.fits:
            part = max(budget.parts, key=lambda name: budget.parts[name])
            raise UsageError(
                asked=f"to quantize {needs.model} into {needs.out} with "
                f"{in_units(budget.needed)} of {budget.name} ({budget.phase})",
                found=f"{in_units(budget.free)}",
                why=f"the largest part is {part}, {in_units(budget.parts[part])}; a run that takes "
                "more than there is ends after hours, killed or with a full disk",
                todo="; or ".join(needs.changes) or f"use a machine with more {budget.name}",
            )


def compute_budget(job: Job, machine: Machine, activation_memory: int) -> Budget:
    """What is needed of the memory where it computes."""
    keep = job.activations <= activation_memory
    return memory.budgets(job, machine.resident, machine.memory, machine.device, keep)[0]


def every_budget(job: Job, machine: Machine, activation_memory: int) -> list[Budget]:
    """All that is needed of the machine."""
    keep = job.activations <= activation_memory
    return [
        *memory.budgets(job, machine.resident, machine.memory, machine.device, keep),
        disk.budget(job, machine.disk, machine.written),
    ]


def changes(job: Job, machine: Machine, activation_memory: int, short: Budget) -> Iterator[str]:
    """What would make a budget fit, with what it would come to then."""

    def need(changed: Job, activations: int = activation_memory) -> Budget:
        every = every_budget(changed, machine, activations)
        return next(budget for budget in every if budget.name == short.name)

    proposed: set[str] = set()
    for words, changed, activations in _alternatives(job, activation_memory):
        found, kind = need(changed, activations), words.partition(" ")[0]
        if found.fits and (kind == "--method" or kind not in proposed):
            proposed.add(kind)
            yield f"{words} would need {in_units(found.needed)}"
    if short.name == "disk":
        yield f"name a folder on a disk with {in_units(short.needed)} free"
    elif short.name == "device memory":
        yield "--device cpu"


def _alternatives(job: Job, activation_memory: int) -> Iterator[tuple[str, Job, int]]:
    """One change after the other, the mildest first."""
    if job.activations <= activation_memory:
        yield "--activation-memory 0MB (activations on disk)", job, 0
    tokens = job.tokens // 4
    while tokens >= job.seqlen:
        few = replace(job, tokens=tokens // job.seqlen * job.seqlen)
        yield f"--calibration-tokens {few.tokens}", few, activation_memory
        tokens //= 4
    recipe = job.recipe
    if recipe.outliers is not None:
        as_it_is = replace(job, recipe=replace(recipe, outliers=None))
        yield "leaving --outliers away", as_it_is, activation_memory
    others = []
    if recipe.rounding.needs_hessian and not recipe.method.needs_compensation:
        others.append(replace(recipe, rounding=RTN()))
    if recipe.method.needs_hessian or recipe.method.rotates:
        others.append(replace(recipe, method=Hadamard()))
        others.append(replace(recipe, method=Hadamard(), rounding=RTN()))
    for other in dict.fromkeys(others):
        words = f"--method {method_name(other.method)} --rounding {rounding_name(other.rounding)}"
        yield words, replace(job, recipe=other), activation_memory


def _notes(recipe: Recipe) -> Iterator[str]:
    if recipe.method.rotates:
        yield (
            f"What {method_name(recipe.method)} takes to choose rotations of the whole model, in "
            "memory and in time, is not counted."
        )
