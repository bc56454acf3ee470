"""What a run will need beside what there is: the record, and its table. Knows no torch.

Sizes are in bytes here and in units of 1000 where they are shown, as a disk's maker counts.
"""

import json
from dataclasses import asdict, dataclass

from rich.markup import escape
from rich.table import Table

VERSION = 1
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One thing that a run takes from the machine."""

    name: str
    """Which: memory, device memory, disk."""
    phase: str
    """When it is needed most."""
    parts: dict[str, int]
    """Bytes by part, at that time."""
    free: int
    """Bytes that there are for all parts together: what they have already counts as free."""

    @property
    def needed(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there are that many."""
        return self.needed <= self.free


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run will need."""

    model: str
    out: str
    device: str
    budgets: tuple[Budget, ...]
    activation_memory: int
    """Bytes up to which activations stay in memory."""
    layers: int
    """Of the model."""
    finished: int
    """Those that an earlier process has finished."""
    seconds: float | None
    """About how long it will take, from a measured probe; None where nobody measured."""
    changes: tuple[str, ...] = ()
    """What would make it fit, where something does not."""
    notes: tuple[str, ...] = ()
    """What the figures leave out."""

    def to_json(self) -> str:
        """The record as JSON text."""
        content = {"version": VERSION, **asdict(self)}
        for budget, written in zip(self.budgets, content["budgets"], strict=True):
            written["needed"] = budget.needed
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def table(needs: Needs) -> Table:
    """What is needed and what is free, part by part, for a terminal."""
    shown = Table(title=escape(f"Quantizing {needs.model} into {needs.out}"), title_justify="left")
    shown.add_column("needed at the worst moment", no_wrap=True)
    shown.add_column("bytes", justify="right", no_wrap=True)
    shown.add_column("free", justify="right", no_wrap=True)
    for budget in needs.budgets:
        style = "bold" if budget.fits else "bold red"
        shown.add_row(
            f"{budget.name} ({budget.phase})",
            in_units(budget.needed),
            in_units(budget.free),
            style=style,
        )
        for part, size in sorted(budget.parts.items(), key=lambda item: -item[1]):
            shown.add_row(f"  {part}", in_units(size), "")
        shown.add_section()
    notes = [f"Computed on {needs.device}, {time_left(needs)}.", *needs.notes]
    shown.caption, shown.caption_justify = escape("\n".join(notes)), "left"
    return shown


def time_left(needs: Needs) -> str:
    """How long it will take, in words."""
    if needs.seconds is None:
        return "time not measured"
    return f"{duration(needs.seconds)} by a probe of the first layer"


def finished_of(finished: int, layers: int | None) -> str:
    """How much of a run is finished: ``3 of 8 layers are finished``."""
    many = f"{finished}" if layers is None else f"{finished} of {layers}"
    noun = "layer" if (layers or finished) == 1 else "layers"
    return f"{many} {noun} {'is' if finished == 1 else 'are'} finished"


def in_units(size: int) -> str:
    """Bytes with a unit and two or three digits: ``3.1 GB``."""
    value, unit = float(size), 0
    while round(value, 1) >= 1000 and unit + 1 < len(_UNITS):
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[0]}" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """About how long: ``about 1 h 50 min``."""
    if round(seconds) < 60:
        return f"about {max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 10:
        return f"about {minutes} min"
    minutes = 5 * round(minutes / 5)
    hours, rest = divmod(minutes, 60)
    if hours == 0:
        return f"about {rest} min"
    return f"about {hours} h" if rest == 0 or hours >= 24 else f"about {hours} h {rest} min"
