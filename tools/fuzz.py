"""Coverage-guided fuzzing of one reader: ``python tools/fuzz.py headers -max_total_time=600``.

What follows the name goes to libFuzzer, a folder for its corpus among it. A crash is any exception
that is not ours; libFuzzer writes the input that led to it into the working directory. Needs
``pip install atheris`` (CPython 3.11 to 3.13 on Linux), which neither the package nor its tests
depend on: the tests fuzz the same readers with hypothesis, which knows the documents' structure.
What this adds is bytes nobody thought of, steered by which lines they reach.
"""

import json
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["mxtorq.reading", "mxtorq.export", "json", "tomllib"]):
    from mxtorq.config import plan_from, read_settings, recipe_from
    from mxtorq.errors import ModelError, MxtorqError
    from mxtorq.export.manifest import Manifest
    from mxtorq.reading.configuration import read_configuration, require_plausible
    from mxtorq.reading.documents import Refusal
    from mxtorq.reading.shards import open_shards
    from mxtorq.reports.schema import Results

REFUSE = Refusal(kind=ModelError, asked="a file", why="it is odd", todo="none")
ROOM = Path(tempfile.mkdtemp(prefix="mxtorq-fuzz-", dir="/dev/shm"))


def headers(data: bytes) -> None:
    """A safetensors file: the header from the input, its length and the data made to fit it."""
    text, _, rest = data.partition(b"\n")
    (ROOM / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + rest)
    shards = open_shards(ROOM, REFUSE)
    assert shards.total_bytes == len(rest)
    for name in shards.names:
        shards.tensor(name)


def index(data: bytes) -> None:
    """The index of a folder with one file."""
    folder = ROOM / "indexed"
    folder.mkdir(exist_ok=True)
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    text = json.dumps({"a": entry}).encode()
    (folder / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"x")
    (folder / "model.safetensors.index.json").write_bytes(data)
    assert open_shards(folder, REFUSE).files == ["m.safetensors"]


def configuration(data: bytes) -> None:
    """A config.json."""
    (ROOM / "config.json").write_bytes(data)
    require_plausible(read_configuration(ROOM / "config.json", REFUSE), 20, 10**6, REFUSE)


def manifest(data: bytes) -> None:
    """A manifest."""
    Manifest.from_json(data.decode("utf-8", "replace"), "here").to_json()


def record(data: bytes) -> None:
    """A record of results."""
    Results.from_json(data.decode("utf-8", "replace")).to_json()


def recipe(data: bytes) -> None:
    """A recipe in TOML."""
    (ROOM / "recipe.toml").write_bytes(data)
    settings, evaluation = read_settings(ROOM / "recipe.toml")
    recipe_from(settings)
    plan_from(evaluation)


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (headers, index, configuration, manifest, record, recipe)
}


def main() -> None:
    """Fuzz the reader that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python tools/fuzz.py {'|'.join(TARGETS)} [libFuzzer options]")
    target = TARGETS[sys.argv.pop(1)]

    def once(data: bytes) -> None:
        try:
            target(data)
        except MxtorqError:
            return

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
