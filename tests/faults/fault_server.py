"""A process that has imported everything and computed nothing, and forks a child for each attempt.

Starting Python with torch and transformers takes seconds, a fork takes milliseconds. Threads and
forks do not mix, so nothing is computed here: the first tensor is made by a child.

A request is a line of JSON on stdin: a run, and what happens to it. A child tells of the end that
it came to in a file, if it comes to one. In the child every operation that changes a file system is
an *event* (`Disk`), numbered from 1; a fault is something that happens at one.

    kill          the process is gone before event K, or in the middle of it if it is a write
    once, full    event K fails, or all that need space from there on
    stop          the process is stopped before event K, until somebody continues or ends it
    cut           the power fails before event K: see `Platter`
"""

import builtins
import errno
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

_RENAME, _UNLINK, _MKDIR, _RMDIR = os.rename, os.unlink, os.mkdir, os.rmdir
_FSYNC, _LINK, _OPEN, _FILE = os.fsync, os.link, os.open, io.open
_NEED_SPACE = {"write", "open", "mkdir", "link", "fsync"}


class Platter:
    """What a disk has for certain: bytes by the last fsync of a file, names by that of a folder.

    A power cut keeps that, and of all that happened since any part: each name and each file is as
    it was or as it is. ``seed`` draws the parts; without one nothing of it is kept.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, tuple[int, bool]]] = {}
        self.synced(root)

    def synced(self, path: Path) -> None:
        facts = path.stat()
        if stat.S_ISDIR(facts.st_mode):
            self.folders[facts.st_ino] = self._names(path)
        else:
            with _FILE(path, "rb") as file:
                self.files[facts.st_ino] = file.read()

    def image(self, target: Path, seed: int | None) -> None:
        """Write what is there when the power comes back."""
        draw = None if seed is None else random.Random(seed)
        now: dict[int, bytes] = {}
        folders: dict[int, dict[str, tuple[int, bool]]] = {}
        for path in [self.root, *self.root.rglob("*")]:
            facts = path.lstat()
            if stat.S_ISDIR(facts.st_mode):
                folders[facts.st_ino] = self._names(path)
            else:
                with _FILE(path, "rb") as file:
                    now[facts.st_ino] = file.read()
        self._write(self.root.stat().st_ino, target, now, folders, draw)

    def _write(
        self,
        inode: int,
        target: Path,
        now: dict[int, bytes],
        folders: dict[int, dict[str, tuple[int, bool]]],
        draw: random.Random | None,
    ) -> None:
        os.makedirs(target, exist_ok=True)
        before, after = self.folders.get(inode, {}), folders.get(inode, {})
        for name in sorted({*before, *after}):
            one, other = before.get(name), after.get(name)
            entry = other if draw is not None and draw.random() < 0.5 else one
            if entry is None:
                continue
            child, is_folder = entry
            if is_folder:
                self._write(child, target / name, now, folders, draw)
                continue
            kept, latest = self.files.get(child), now.get(child)
            content = latest if draw is not None and draw.random() < 0.5 else kept
            if content is None:
                content = b"" if kept is None else kept
            with _FILE(target / name, "wb") as file:
                file.write(content)

    def _names(self, path: Path) -> dict[str, tuple[int, bool]]:
        with os.scandir(path) as found:
            return {each.name: (each.inode(), each.is_dir(follow_symlinks=False)) for each in found}


class Disk:
    """Counts what changes a file system below a folder, and lets a fault happen."""

    def __init__(self, root: Path, fault: dict[str, Any]) -> None:
        self.root, self.fault, self.count = root.resolve(), fault, 0
        self.kinds: list[str] = []
        self.platter = Platter(self.root) if fault["kind"] in ("cut", "trace") else None

    def install(self) -> None:
        """Take the place of what changes files, in this process."""
        os.rename = os.replace = self._two("rename", _RENAME)  # type: ignore[assignment]
        os.link = self._two("link", _LINK)  # type: ignore[assignment]
        os.unlink = os.remove = self._one("unlink", _UNLINK)  # type: ignore[assignment]
        os.mkdir = self._one("mkdir", _MKDIR)  # type: ignore[assignment]
        os.rmdir = self._one("rmdir", _RMDIR)  # type: ignore[assignment]
        os.fsync = self._fsync  # type: ignore[assignment]
        os.open = self._open_handle  # type: ignore[assignment]
        io.open = builtins.open = self._open  # type: ignore[assignment]

    def concerns(self, path: Any) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return os.path.abspath(os.fspath(path)).startswith(str(self.root))

    def event(self, kind: str, half: Any = None) -> None:
        self.count += 1
        self.kinds.append(kind)
        at, what = self.fault.get("at"), self.fault["kind"]
        if what == "full" and self.count >= at and kind in _NEED_SPACE:
            raise OSError(errno.ENOSPC, "No space left on device (injected)")
        if self.count != at:
            return
        if what == "kill":
            if half is not None:
                half()
            gone()
        elif what == "once":
            raise OSError(errno.EIO, "Input/output error (injected)")
        elif what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "cut" and self.platter is not None:
            self.platter.image(Path(self.fault["image"]), self.fault.get("seed"))
            gone()

    def _one(self, kind: str, real: Any) -> Any:
        def call(path: Any, *args: Any, dir_fd: int | None = None, **options: Any) -> Any:
            where = path if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            if self.concerns(where):
                self.event(kind)
            if dir_fd is not None:
                options["dir_fd"] = dir_fd
            return real(path, *args, **options)

        return call

    def _two(self, kind: str, real: Any) -> Any:
        def call(source: Any, target: Any, **options: Any) -> Any:
            if self.concerns(target):
                self.event(kind)
            return real(source, target, **options)

        return call

    def _fsync(self, handle: int) -> None:
        if self.concerns(handle):
            self.event("fsync")
        _FSYNC(handle)
        if self.platter is not None and self.concerns(handle):
            self.platter.synced(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def _open_handle(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT and self.concerns(path):
            self.event("open")
        return _OPEN(path, flags, *args, **options)

    def _open(
        self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **opts: Any
    ) -> Any:
        writes = any(letter in mode for letter in "wax+")
        if not writes or isinstance(file, int) or not self.concerns(file):
            return _FILE(file, mode, buffering, *args, **opts)
        self.event("open")
        buffer = io.BufferedWriter(_Raw(file, mode.replace("b", "").replace("t", ""), self))
        return buffer if "b" in mode else io.TextIOWrapper(buffer, *args, **opts)


class _Raw(io.FileIO):
    def __init__(self, file: Any, mode: str, disk: Disk) -> None:
        super().__init__(file, mode)
        self._disk = disk

    def write(self, data: Any) -> int:
        def half() -> None:
            view = memoryview(data).cast("B")
            super(_Raw, self).write(view[: len(view) // 2])

        self._disk.event("write", half)
        return super().write(data) or 0


def gone() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def attempt(request: dict[str, Any]) -> dict[str, Any]:
    """One run in this process, and how it ended."""
    from mxtorq import pipeline
    from mxtorq.errors import MxtorqError
    from mxtorq.export import checkpoint

    out = Path(request["out"])
    pipeline.require = lambda needs: None  # the disk shall fail during a run, not be foreseen
    if request.get("shards"):
        checkpoint.SINGLE_FILE = 0
    fault = request.get("fault") or {"kind": "none"}
    disk = Disk(Path(request.get("root") or out.parent), fault)
    disk.install()
    limit = request.get("largest_file")
    if limit:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error code instead of a signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    started, worked = time.perf_counter(), time.process_time()
    try:
        pipeline.quantize(
            request["model"],
            out,
            recipe(request),
            device="cpu",
            activation_memory=request.get("memory"),
        )
        told: dict[str, Any] = {"error": None}
    except MxtorqError as error:
        told = {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        told = {"error": f"foreign {type(error).__name__}", "message": str(error)}
    seconds = time.perf_counter() - started
    work = time.process_time() - worked
    counted = {"events": disk.count, "kinds": disk.kinds}
    return {**told, **counted, "seconds": seconds, "work": work}


def recipe(request: dict[str, Any]) -> Any:
    from mxtorq.config import recipe_from

    return recipe_from(request["recipe"])


def child(request: dict[str, Any]) -> NoReturn:
    quiet = _OPEN(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(quiet, handle)
    warnings.simplefilter("ignore")
    told = attempt(request)
    with _FILE(request["answer"] + ".new", "w") as file:
        json.dump(told, file)
    _RENAME(request["answer"] + ".new", request["answer"])
    os._exit(0)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    import mxtorq.pipeline  # noqa: F401
    from mxtorq.kernels import dispatch

    # Eager torch has the bits of the compiled kernels, and each child would load these anew.
    dispatch._installed = lambda name: False

    for line in sys.stdin:
        request = json.loads(line)
        if "wait_for" in request:
            _, status = os.waitpid(request["wait_for"], 0)
            say(json.dumps({"status": status}))
            continue
        if "command" in request:
            done = subprocess.run(request["command"], capture_output=True, text=True, check=True)
            say(json.dumps({"output": done.stdout}))
            continue
        pid = os.fork()
        if not pid:
            child(request)
        say(json.dumps({"pid": pid}))


if __name__ == "__main__":
    main()
