"""Whatever a file holds, its reader returns a value or raises an error of ours; memory is bounded.

Three kinds of foreign input: damaged (a good file with bits flipped, cut or repeated), odd (a good
document in which one value is another one) and arbitrary. The examples are the same in each run.
What a reader accepts is used as the program would use it, so that a value which breaks its user an
hour later counts as a find.

``MXTORQ_FUZZ=20 pytest tests/fuzz`` takes twenty times as many examples, and others in each run.
"""

import hashlib
import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load as library_load
from safetensors.torch import save

from mxtorq import pipeline
from mxtorq.calibration.data import load_text
from mxtorq.config import (
    Recipe,
    parse_method,
    parse_rounding,
    plan_from,
    read_settings,
    recipe_from,
)
from mxtorq.console import resumed
from mxtorq.errors import CheckpointError, ModelError, MxtorqError
from mxtorq.export.manifest import Manifest
from mxtorq.loading.checkpoint import load_checkpoint
from mxtorq.loading.source import load_source
from mxtorq.models import FAMILIES
from mxtorq.reading.configuration import read_configuration, require_plausible
from mxtorq.reading.documents import Refusal
from mxtorq.reading.headers import DTYPES
from mxtorq.reading.shards import open_shards
from mxtorq.reports.contents import checkpoint_facts, checkpoint_sites
from mxtorq.reports.pages.choices import manifest_choices
from mxtorq.reports.render import markdown, terminal
from mxtorq.reports.schema import Results
from mxtorq.rounding import ROUNDINGS
from mxtorq.surgery.outliers import add_outliers_
from mxtorq.transforms import METHODS

CPU = torch.device("cpu")
REFUSE = Refusal(kind=ModelError, asked="a file", why="it is odd", todo="get another one")
ROOT = Path(__file__).parents[2]


LONGER = int(os.environ.get("MXTORQ_FUZZ", "0"))


def fuzz(examples: int) -> Callable[[Any], Any]:
    """The same examples each time, unless a longer search is asked for; no database of them."""
    return settings(
        max_examples=examples * max(1, LONGER),
        derandomize=not LONGER,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# What is fed.

SCALARS = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, 1e308]
    ),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), "", "\0", "..", "../x", "/etc"]),
    st.sampled_from(["[/b]", "[b", "\ud800", "a/b", "x" * 3000, "true", "nan", "1e999", "\u2028"]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def places(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in a document, as paths."""
    yield here
    if isinstance(document, dict | list):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in items:
            yield from places(value, (*here, key))


@st.composite
def odd(draw: st.DrawFn, document: Any) -> Any:
    """A document with one to three values replaced, removed or added."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        if not path:
            continue
        at = document
        for key in path[:-1]:
            at = at[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                at[path[-1]] = draw(VALUES)
            case "remove":
                del at[path[-1]]
            case "add" if isinstance(at, dict):
                at[draw(st.text(max_size=8))] = draw(VALUES)
            case "add":
                at.append(draw(VALUES))
    return document


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are flipped, cut out, repeated or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 40))
        match draw(st.sampled_from(["flip", "cut", "repeat", "insert", "end"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + length]
            case "repeat":
                data[at:at] = data[at : at + length] * draw(st.integers(1, 3))
            case "insert":
                data[at:at] = draw(st.binary(max_size=20))
            case _:
                del data[at:]
    return bytes(data)


def texts(document: Any) -> st.SearchStrategy[bytes]:
    """JSON files like this document, more or less."""
    good = json.dumps(document).encode()
    return st.one_of(
        odd(document).map(lambda value: json.dumps(value).encode()),
        damaged(good),
        VALUES.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=50),
        st.sampled_from([b"[" * 50_000, b'{"a":' * 50_000, b"9" * 5000, b'"\\ud800"']),
    )


# What may come of it.


@contextmanager
def only_ours() -> Iterator[None]:
    with suppress(MxtorqError):
        yield


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Memory of some bytes a byte that was read, and of a message.

    The dearest JSON is ``{},``: 64 bytes of a dict and 8 of a pointer for three characters, which
    are up to four bytes each, and a list keeps an eighth in reserve.
    """
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 64 * size + 2**20


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def checkpoint(tiny_folders: dict[str, Path], story: Path, room: Path) -> Path:
    recipe = Recipe(
        method=parse_method("hadamard"),
        calibration=str(story),
        calibration_tokens=128,
        seqlen=64,
    )
    pipeline.quantize(str(tiny_folders["llama"]), room / "checkpoint", recipe, device="cpu")
    return room / "checkpoint"


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "layer_types": ["full_attention"],
    "rope_scaling": {"rope_type": "default"},
    "text_config": {"hidden_size": 64},
}


@fuzz(300)
@given(content=texts(CONFIG))
def test_configurations(content: bytes, room: Path) -> None:
    path = room / "config.json"
    path.write_bytes(content)
    with bounded(len(content)), only_ours():
        config = read_configuration(path, REFUSE)
        require_plausible(config, 20, 10**6, REFUSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_with_odd_configurations(
    name: str, tiny_folders: dict[str, Path], room: Path
) -> None:
    model = Path(shutil.copytree(tiny_folders[name], room / name))
    path = model / "config.json"
    honest = json.loads(path.read_text())

    @fuzz(40)
    @given(config=odd(honest), at_rest=st.booleans())
    def check(config: Any, at_rest: bool) -> None:
        path.write_text(json.dumps(config))
        with only_ours():
            load_source(str(model), CPU, at_rest=at_rest).longest_window()

    check()


def header_of(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


TENSORS = {"a": torch.arange(6).view(2, 3), "b": torch.ones(5).half(), "c": torch.zeros(0, 4)}
GOOD = save(TENSORS, metadata={"format": "pt"})
LENGTHS = st.sampled_from([0, 1, 8, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 9, 2**64 - 1])


@st.composite
def any_header(draw: st.DrawFn) -> dict[str, Any]:
    """Tensors that may or may not fit together."""
    sizes = st.integers(0, 9) | st.sampled_from([2**31, 2**62, 2**63, -1])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*DTYPES, "F4", "f32", ""]),
            "shape": st.lists(sizes, max_size=3),
            "data_offsets": st.tuples(sizes, sizes),
        }
    )
    return draw(st.dictionaries(st.text(max_size=5), entry, max_size=3))


@st.composite
def tensor_files(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["damaged", "odd", "any", "length"]))
    if kind == "damaged":
        return draw(damaged(GOOD))
    if kind == "length":
        return struct.pack("<Q", draw(LENGTHS)) + GOOD[8:]
    header = draw(odd(header_of(GOOD)) if kind == "odd" else any_header())
    text = json.dumps(header).encode()
    data = GOOD[8 + int.from_bytes(GOOD[:8], "little") :]
    return struct.pack("<Q", len(text)) + text + data[: draw(st.integers(0, len(data)))]


@fuzz(500)
@given(content=tensor_files())
def test_tensor_files(content: bytes, room: Path) -> None:
    folder = room / "tensors"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    found = {}
    with bounded(len(content)), only_ours():
        shards = open_shards(folder, REFUSE)
        assert shards.total_bytes <= len(content)
        found = {name: shards.tensor(name) for name in shards.names}
    if found:  # what is accepted here, the library accepts, and reads the same
        expected = library_load(content)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert found[name].numpy().tobytes() == tensor.numpy().tobytes()


@fuzz(200)
@given(
    content=texts(
        {
            "metadata": {"total_size": 3},
            "weight_map": {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-1.safetensors"},
        }
    )
)
def test_indices(content: bytes, room: Path) -> None:
    folder = room / "indexed"
    folder.mkdir(exist_ok=True)
    (folder / "m-1.safetensors").write_bytes(GOOD)
    (folder / "model.safetensors.index.json").write_bytes(content)
    with bounded(len(content) + len(GOOD)), only_ours():
        assert set(open_shards(folder, REFUSE).names) == set(TENSORS)


def shown(*tables: object) -> None:
    with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        console = Console(file=nowhere, width=200)
        for table in tables:
            console.print(table)


def test_manifests(checkpoint: Path) -> None:
    honest = json.loads((checkpoint / "mxtorq.json").read_text())
    honest["sites"] = honest["sites"][:2]
    honest["sites"][0]["experts"] = {"count": 4, "pooled": 1, "unseen": 0}
    losses = {"losses": {"wush": 0.5, "perq": 1}, "at_least": {"identity": 0.75}}
    honest["sites"][1]["choice"] = {"candidate": "wush", **losses}
    Manifest.from_json(json.dumps(honest), "here")

    @fuzz(250)
    @given(content=texts(honest))
    def check(content: bytes) -> None:
        with only_ours():
            manifest = Manifest.from_json(content.decode("utf-8", "replace"), "here")
            shown(checkpoint_facts(manifest, "here"), checkpoint_sites(manifest))
            manifest_choices(manifest)

    check()


def test_checkpoints_that_agree_with_their_manifest(checkpoint: Path) -> None:
    """Odd manifests, configurations and tensors whose hashes are right."""
    names = ("mxtorq.json", "config.json", "generation_config.json", "tokenizer_config.json")
    honest = {name: (checkpoint / name).read_text() for name in names}
    load_checkpoint(checkpoint, CPU)

    @fuzz(60)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(names))
        content = json.dumps(data.draw(odd(json.loads(honest[name])))).encode()
        (checkpoint / name).write_bytes(content)
        if name != "mxtorq.json":
            manifest = json.loads(honest["mxtorq.json"])
            digest = hashlib.sha256(content).hexdigest()
            manifest["files"][name] = {"sha256": digest, "bytes": len(content)}
            (checkpoint / "mxtorq.json").write_text(json.dumps(manifest))
        with only_ours():
            load_checkpoint(checkpoint, CPU)
        for each, text in honest.items():
            (checkpoint / each).write_text(text)

    check()


RECIPE = (ROOT / "recipes" / "torq.toml").read_bytes()
SETTINGS = {
    "method": {"name": "torq", "levels": "inter", "complementarity": 0.5, "rounds": 3},
    "rounding": "gptq:order=backward",
    "scale_rule": "floor",
    "seed": 3,
    "seqlen": 64,
    "outliers": "qwen3-0.6b",
    "allow_unfit": True,
    "evaluation": {"text": "stdlib", "seqlen": 64},
}


@fuzz(300)
@given(
    content=st.one_of(
        damaged(RECIPE),
        st.binary(max_size=60),
        st.sampled_from([b"a=" + b"[" * 9000, b"a=" + b"9" * 5000, b"a." * 20_000, b"#" * 70_000]),
    )
)
def test_recipe_files(content: bytes, room: Path) -> None:
    path = room / "recipe.toml"
    path.write_bytes(content)
    with only_ours():
        settings, evaluation = read_settings(path)
        plan_from(evaluation)
        recipe_from(settings).to_dict()


@fuzz(300)
@given(content=odd(SETTINGS))
def test_settings(content: Any) -> None:
    with only_ours():
        evaluation = content.pop("evaluation", {})
        recipe_from(content).to_dict()
        plan_from(evaluation if isinstance(evaluation, dict) else {})


WORDS = st.one_of(
    st.sampled_from([*METHODS, *ROUNDINGS, "levels", "order", "rounds", "=", ":", ".", "inter"]),
    st.sampled_from(["mxtorq.transforms.base:TransformMethod", "mxtorq.rounding.base:Rounding"]),
    st.sampled_from(["1e999", "nan", "-1", "0", "1" * 5000, "\0", "\ud800", "..:x", ".a:b", "a.:"]),
    st.text(max_size=6),
)


@fuzz(400)
@given(parts=st.lists(WORDS, max_size=6), glue=st.sampled_from(["", ":", "=", ":="]))
def test_names_with_options(parts: list[str], glue: str) -> None:
    for parse in (parse_method, parse_rounding):
        with only_ours():
            parse(glue.join(parts))


@st.composite
def specs(draw: st.DrawFn) -> str:
    """A known name with its own options and odd values."""
    table = {**METHODS, **ROUNDINGS}
    name = draw(st.sampled_from(sorted(table)))
    options = sorted(table[name].__dataclass_fields__)
    chosen = draw(st.lists(st.sampled_from(options), max_size=3)) if options else []
    return ":".join([name, *(f"{option}={draw(SCALARS)}" for option in chosen)])


@fuzz(400)
@given(spec=specs())
def test_known_names_with_odd_values(spec: str) -> None:
    for parse, key in ((parse_method, "method"), (parse_rounding, "rounding")):
        with only_ours():
            parse(spec)
            recipe_from({"method": "torq", key: spec}).to_dict()


ROW: dict[str, Any] = {
    "method": "torq",
    "rounding": "rtn",
    "scale_rule": "floor",
    "perplexity": 2.5,
    "nll": 1.0,
    "predictions": 9,
    "seed": 0,
    "outliers": None,
    "site_error": 0.1,
    "site_errors": {"model.layers.0.qkv_in": 0.25, "model.layers.0.down_in": 0.5},
    "multiply_adds_per_token": 5,
    "options": {"levels": "both"},
    "provenance": {
        "evaluation": {"source": "t", "tokens": 100, "seqlen": 10, "text_sha256": "a"},
        "calibration": {"source": "c", "tokens": 50, "seqlen": 10, "text_sha256": "b", "seed": 4},
        "unfit": {"model.layers.0.down_in": 40},
    },
}
RECORD = {
    "schema": "mxtorq.results",
    "version": 1,
    "rows": [
        {**ROW, "rounding": None, "scale_rule": None, "method": "bf16", "site_errors": {}},
        ROW,
        {**ROW, "seed": 1},
    ],
    "versions": {"mxtorq": "0"},
    "command": "mxtorq compare",
}


@fuzz(300)
@given(content=texts(RECORD))
def test_records(content: bytes, room: Path) -> None:
    path = room / "record.json"
    path.write_bytes(content)
    with only_ours():
        results = resumed(path, True)
        assert isinstance(results, Results)
        shown(terminal(results, "title"))
        markdown(results).encode()
        assert Results.from_json(results.to_json()).to_json() == results.to_json()


LINE = {"text": "One \u2028 document.", "id": 3}


@fuzz(300)
@given(
    lines=st.lists(
        texts(LINE) | st.sampled_from([b'{"text": "a"}', b'{"text": "\\ud83d"}', b"\r"])
    ),
    suffix=st.sampled_from([".jsonl", ".txt"]),
)
def test_calibration_texts(lines: list[bytes], suffix: str, room: Path) -> None:
    path = room / f"text{suffix}"
    path.write_bytes(b"\n".join(lines))
    with only_ours():
        text = load_text(str(path), "calibration")
        assert len(text.sha256) == 64


@fuzz(100)
@given(name=st.text(max_size=30) | SCALARS.map(str))
def test_names_of_texts_and_outliers(name: str) -> None:
    with only_ours():
        if name.partition(":")[0] not in ("stdlib", "wikitext2", "c4"):
            load_text(name, "evaluation")
    with pytest.raises(MxtorqError):
        add_outliers_(torch.nn.Linear(2, 2), FAMILIES["llama"], name, 0)


def test_a_find_would_be_one(room: Path) -> None:
    """The properties can fail: a foreign exception and memory that grows are both noticed."""
    with pytest.raises(KeyError), only_ours():
        raise KeyError
    with pytest.raises(AssertionError), bounded(10):
        assert len(bytes(2**21)) == 2**21
    with only_ours():
        raise CheckpointError(asked="", found="", why="", todo="")
