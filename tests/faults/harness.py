"""What the fault tests share: runs in forked children, and the hash of every file they leave."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAULTS = int(os.environ.get("MXTORQ_FAULTS", "1"))
"""How many times as many points as usual are tried."""


RUNS = ("kept", "spilled", "rotated", "rotated-spilled", "chosen")
SEED = 20 if FAULTS == 1 else time.time_ns() % 2**32
"""Of all that is drawn: the same points each time, unless more are asked for."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: by a signal, with an error, or well."""

    killed: bool
    error: str | None = None
    message: str = ""
    events: int = 0
    kinds: tuple[str, ...] = ()
    seconds: float = 0.0
    work: float = 0.0
    """Seconds of the processor, which a busy machine does not lengthen."""


@dataclass(kw_only=True)
class Run:
    """What is asked for, apart from where."""

    model: Path
    recipe: dict[str, Any]
    shards: bool = False
    memory: int | None = None
    digest: dict[str, str] = field(default_factory=dict)
    """Of the files of an undisturbed run."""
    events: int = 0
    """Of an undisturbed run."""
    seconds: float = 0.0
    work: float = 0.0
    largest: int = 0
    """Bytes of its largest file."""


class Server:
    """See `fault_server`."""

    def __init__(self, folder: Path, *prefix: str) -> None:
        """``prefix``: a command that starts the server's."""
        self._folder, self._count = folder, 0
        self._answers: dict[int, Path] = {}
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(Path(__file__).with_name("fault_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )

    def start(self, run: Run, out: Path, fault: dict[str, Any] | None = None, **more: Any) -> int:
        """Begin a run; returns the process."""
        self._count += 1
        request = {
            "model": str(run.model),
            "recipe": run.recipe,
            "shards": run.shards,
            "memory": run.memory,
            "out": str(out),
            "answer": str(self._answer(self._count)),
            "fault": fault,
            **more,
        }
        pid = int(self._say(request)["pid"])
        self._answers[pid] = self._answer(self._count)
        return pid

    def wait(self, pid: int) -> Ended:
        """Until a run has ended."""
        status = self._say({"wait_for": pid})["status"]
        answer = self._answers.pop(pid)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, f"ended by signal {os.WTERMSIG(status)}"
            assert not answer.exists() or answer.unlink() is None
            return Ended(killed=True)
        told = json.loads(answer.read_text())
        answer.unlink()
        return Ended(killed=False, **{**told, "kinds": tuple(told["kinds"])})

    def run(self, run: Run, out: Path, fault: dict[str, Any] | None = None, **more: Any) -> Ended:
        """A run, to its end."""
        return self.wait(self.start(run, out, fault, **more))

    def run_for(self, run: Run, out: Path, seconds: float) -> Ended:
        """A run that is killed after some time, unless it ends before."""
        pid = self.start(run, out)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # of one that has ended and was not waited for: nothing
        return self.wait(pid)

    def call(self, *command: str) -> str:
        """What a command says that is run where the server runs."""
        return str(self._say({"command": command})["output"])

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _answer(self, number: int) -> Path:
        return self._folder / f"answer-{number}.json"

    def _say(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the server has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


def points(run: Run, count: int, draw: random.Random) -> list[int]:
    """Events from the first to the last, one of each stretch of equal length."""
    step = run.events / count
    return [
        draw.randint(int(i * step) + 1, max(int(i * step) + 1, int((i + 1) * step)))
        for i in range(count)
    ]


def wait_until_stopped(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.005)


def say(text: str) -> None:
    """Told by pytest where a test fails: which points it tried."""
    sys.stdout.write(f"{text}\n")


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def beside(out: Path) -> list[str]:
    """What lies in the parent of an output."""
    return sorted(path.name for path in out.parent.iterdir())


def require_right(out: Path, run: Run) -> None:
    """The folder holds the bytes of an undisturbed run, and nothing but its log lies beside it."""
    assert digest(out) == run.digest
    assert set(beside(out)) - {f"{out.name}.log"} == {out.name}


def undisturbed(server: Server, run: Run, out: Path) -> Run:
    """The run, with what it gives when nothing happens to it."""
    ended = server.run(run, out, {"kind": "count"})
    assert ended.error is None, ended.message
    run.digest, run.events = digest(out), ended.events
    run.seconds, run.work = ended.seconds, ended.work
    run.largest = max(path.stat().st_size for path in out.iterdir())
    assert set(beside(out)) - {f"{out.name}.log"} == {out.name}
    return run
