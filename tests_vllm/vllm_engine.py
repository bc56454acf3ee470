"""vLLM's server as a process of its own, asked over HTTP as anyone would.

The environment is what a small shared machine needs: a cache of 1 GiB, no binding of threads to
cores (the automatic one wants a free core besides those of the ranks), and a small share of memory
(the default asks for nine tenths of it). The process gets a group of its own, so that workers end
with it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = (
    *("--max-model-len", "128", "--max-num-seqs", "4", "--gpu-memory-utilization", "0.1"),
    *("--served-model-name", "model", "--host", "127.0.0.1"),
)
PROGRAM = """
import importlib.metadata as metadata
find = metadata.version
metadata.version = lambda name: find("vllm-cpu") + "+cpu" if name == "vllm" else find(name)
from vllm.entrypoints.cli.main import main
main()
"""
"""The program ``vllm``. That of the CPU build asks for the version of a package ``vllm``, which it
is not called, and stops."""
PATIENCE = 600
"""Seconds that a server may take to start: two cores, shared."""


class StartError(Exception):
    """The server ended before it answered; the message is its log."""


@dataclass(frozen=True)
class Scored:
    """A prompt, what the engine wrote after it, and its log-probability of each but the first."""

    tokens: list[int]
    log_probabilities: list[float]


@dataclass(frozen=True)
class Engine:
    """A server that answers."""

    url: str

    def score(self, prompts: list[list[int]], new: int) -> list[Scored]:
        """Continue prompts greedily by ``new`` tokens."""
        asked = {
            "model": "model",
            "prompt": prompts,
            "max_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "prompt_logprobs": 0,
            "return_tokens_as_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            choices = json.load(answer)["choices"]
        return [_scored(p, c) for p, c in zip(prompts, choices, strict=True)]


def _scored(prompt: list[int], choice: dict[str, Any]) -> Scored:
    before = [
        row[str(token)]["logprob"]
        for token, row in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
    ]
    after = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
    return Scored([*prompt, *after], [*before, *choice["logprobs"]["token_logprobs"]])


@contextmanager
def serve(folder: Path, log: Path, *options: str, plugins: str | None = None) -> Iterator[Engine]:
    """``vllm serve FOLDER`` until the block ends.

    Raises:
        StartError: it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **ENVIRONMENT}
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    command = [sys.executable, "-c", PROGRAM, "serve", str(folder)]
    command += [*OPTIONS, "--port", str(port), *options]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield Engine(url)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise StartError(log.read_text(errors="replace"))
