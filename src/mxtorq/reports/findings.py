"""What an examination found, as data: for people a table, for machines JSON, for scripts a code."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum

SCHEMA = "mxtorq.diagnosis"
VERSION = 1
SICK = 3
"""Exit code where something is wrong; 1 and 2 are an examination that could not be made."""


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; wrong only for some uses."""
    WRONG = "wrong"
    SKIPPED = "skipped"
    """It needs something that was not given."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check's result."""

    check: str
    status: Status
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an engine makes of the checkpoint."""

    engine: str
    runs_as: str
    """``W4A4``, ``W4A16``, ``refused``, or ``WRONG``: it would run and compute something else."""
    why: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All of it."""

    checkpoint: str
    layout: str
    findings: tuple[Finding, ...]
    engines: tuple[Verdict, ...]

    @property
    def healthy(self) -> bool:
        """Whether no check found anything wrong."""
        return all(finding.status is not Status.WRONG for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 or `SICK`."""
        return 0 if self.healthy else SICK

    def to_json(self) -> str:
        content = {"schema": SCHEMA, "version": VERSION, "healthy": self.healthy, **asdict(self)}
        return json.dumps(content, indent=1) + "\n"
