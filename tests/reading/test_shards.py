"""Safetensors files are checked by their headers, and read one tensor at a time."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxtorq.errors import ModelError
from mxtorq.reading.documents import Refusal
from mxtorq.reading.headers import DTYPES, LONGEST
from mxtorq.reading.shards import Shards, open_shards

REFUSE = Refusal(kind=ModelError, asked="a model", why="it is odd", todo="download it again")


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header; ``length`` lies about it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype: str, shape: object, offsets: object) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def write(folder: Path, content: bytes) -> Path:
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two files and their index."""
    torch.manual_seed(0)
    parts = {
        "model-00001-of-00002.safetensors": {"a": torch.randn(3, 5), "b": torch.randn(7).half()},
        "model-00002-of-00002.safetensors": {"c": torch.arange(4), "d": torch.zeros(0, 9)},
    }
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    table = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_rows_are_read_alone(sharded: Path) -> None:
    shards = open_shards(sharded, REFUSE)
    for name, length in (("a", 3), ("b", 7), ("c", 4), ("d", 0)):
        whole = shards.tensor(name)
        for start in range(length + 1):
            for stop in range(start, length + 1):
                rows = shards.tensor(name, slice(start, stop))
                assert torch.equal(rows, whole[start:stop])
                assert (rows.dtype, rows.shape[1:]) == (whole.dtype, whole.shape[1:])
        for start, stop in ((0, length + 1), (-1, 0), (1, 0)):
            with pytest.raises(ModelError, match=f"no rows {start} to {stop} in '{name}'"):
                shards.tensor(name, slice(start, stop))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def require_same(shards: Shards, expected: dict[str, torch.Tensor]) -> None:
    assert set(shards.names) == set(expected)
    for name, tensor in expected.items():
        found = shards.tensor(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found.view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
        assert found.data_ptr() % 64 == 0 or found.numel() == 0
        entry = shards.entry(name)
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert entry.nbytes == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_every_dtype_is_read_as_the_library_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    content = torch.randint(0, 2, (24 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "w": content.view(2, 3, 4)}
    if dtype == torch.float8_e8m0fnu:  # the library's torch half does not know it
        write(tmp_path, raw(one("F8_E8M0", [24], [0, 24]), bytes(content.view(torch.uint8))))
        found = open_shards(tmp_path, REFUSE).tensor("w")
        assert torch.equal(found.view(torch.uint8), content.view(torch.uint8))
        return
    save_file(tensors, tmp_path / "model.safetensors")
    require_same(open_shards(tmp_path, REFUSE), load_file(tmp_path / "model.safetensors"))


def test_unaligned_data_lies_aligned_in_memory(tmp_path: Path) -> None:
    header = {
        "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]},
    }
    write(tmp_path, raw(header, b"\7" + struct.pack("<2d", 1.5, -2.5)))
    tensor = open_shards(tmp_path, REFUSE).tensor("w")
    assert tensor.tolist() == [1.5, -2.5]
    assert tensor.data_ptr() % 64 == 0
    tensor.zero_()
    assert open_shards(tmp_path, REFUSE).tensor("w").tolist() == [1.5, -2.5]


def test_a_sharded_folder(sharded: Path) -> None:
    expected = {
        name: tensor for path in sharded.glob("*-of-*") for name, tensor in load_file(path).items()
    }
    shards = open_shards(sharded, REFUSE)
    require_same(shards, expected)
    assert shards.files == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert shards.total_bytes == sum(t.numel() * t.element_size() for t in expected.values())
    with pytest.raises(ModelError, match="no tensor 'z'"):
        shards.tensor("z")
    save_file({"only": torch.ones(1)}, sharded / "model.safetensors")
    assert open_shards(sharded, REFUSE).names == ["only"]  # one file goes first, as elsewhere
    save_file({"own": torch.ones(1)}, sharded / "other.safetensors")
    assert open_shards(sharded, REFUSE, "other").names == ["own"]


def test_a_snapshot_of_links_as_in_the_cache_of_the_hub(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    blobs = Path(shutil.move(sharded / "model-00001-of-00002.safetensors", tmp_path / "blob"))
    (snapshot / "model-00001-of-00002.safetensors").symlink_to(blobs)
    for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (snapshot / name).symlink_to(sharded / name)
    assert set(open_shards(snapshot, REFUSE).names) == set("abcd")


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((1000,), i) for i in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    shards = open_shards(tmp_path, REFUSE)
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(tensors, pool.map(shards.tensor, tensors), strict=True):
            assert torch.equal(found, tensors[name])


GOOD = one("F32", [2], [0, 8])


def test_the_good_one_is_good(tmp_path: Path) -> None:
    header = {**GOOD, "__metadata__": {"format": "pt"}}
    content = json.dumps(header).encode() + b"   "  # the library pads with spaces
    assert open_shards(write(tmp_path, raw(content, bytes(8))), REFUSE).names == ["w"]
    assert open_shards(write(tmp_path, raw({})), REFUSE).names == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\3\0\0", "in a file of 3"),
        (raw(GOOD, bytes(8), length=2**63 + 5), "lies within its file"),
        (raw(GOOD, bytes(8), length=2**64 - 1), "lies within its file"),
        (raw(GOOD, bytes(8), length=10**6), "lies within its file"),
        (raw(GOOD, bytes(8), length=20), "JSONDecodeError"),
        (raw(b"", bytes(8)), "JSONDecodeError"),
        (raw(b"\xff\xff", bytes(8)), "UnicodeDecodeError"),
        (raw(b"[" * 5000, bytes(8)), "RecursionError"),
        (raw([], bytes(8)), "type list"),
        (raw(b'{"w":1,"w":2}'), "stands there twice"),
        (raw({"w": 5}), "a tensor has a dtype"),
        (raw({"w": {**GOOD["w"], "more": 1}}, bytes(8)), "a tensor has a dtype"),
        (raw({"__metadata__": {"a": 1}, **GOOD}, bytes(8)), "it maps text to text"),
        (raw({"__metadata__": [], **GOOD}, bytes(8)), "it maps text to text"),
        (raw(one("F4", [2], [0, 1]), bytes(1)), "dtype 'F4'"),
        (raw(one([], [2], [0, 8]), bytes(8)), "it is none of BOOL"),  # type: ignore[arg-type]
        (raw(one("F32", [-2], [0, 8]), bytes(8)), "a list of integers from 0"),
        (raw(one("F32", [2.0], [0, 8]), bytes(8)), "a list of integers from 0"),
        (raw(one("F32", [True, 2], [0, 8]), bytes(8)), "a list of integers from 0"),
        (raw(one("F32", 2, [0, 8]), bytes(8)), "a list of integers from 0"),
        (raw(one("F32", [2] + [1] * 64, [0, 8]), bytes(8)), "a list of integers from 0"),
        (raw(one("F32", [2**62, 2**62, 0], [0, 0])), "as many elements"),
        (raw(one("F32", [2**62, 4], [0, 8]), bytes(8)), "as many elements"),
        (raw(one("F32", [10**30], [0, 8]), bytes(8)), "a list of integers from 0"),
        (raw(one("F32", [2], [0, 8, 9]), bytes(8)), "a first and a last byte"),
        (raw(one("F32", [2], [8, 0]), bytes(8)), "a first and a last byte"),
        (raw(one("F32", [2], [-8, 0]), bytes(8)), "a first and a last byte"),
        (raw(one("F32", [2], None), bytes(8)), "a first and a last byte"),
        (raw(one("F32", [3], [0, 8]), bytes(8)), "12 are needed"),
        (raw(one("F32", [2], [0, 8]), bytes(7)), "15 bytes, but|is truncated"),
        (raw(one("F32", [2], [0, 8]), bytes(9)), "that its header does not name"),
        (raw(one("F32", [2], [4, 12]), bytes(12)), "without holes"),
        (raw({**GOOD, "v": GOOD["w"]}, bytes(8)), "without overlap"),
        (raw({"v": {"dtype": "U8", "shape": [2], "data_offsets": [7, 9]}, **GOOD}, bytes(9)), "7"),
    ],
)
def test_wrong_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        open_shards(write(tmp_path, content), REFUSE)


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:  # a hole: it takes no disk
        file.write(struct.pack("<Q", LONGEST + 1))
        file.truncate(LONGEST + 100)
    with pytest.raises(ModelError, match="has up to"):
        open_shards(tmp_path, REFUSE)


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "..",
        "",
        "model\0.safetensors",
        "weights.bin",
        "x" * 300 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_names_plain_files(name: object, sharded: Path) -> None:
    (sharded / "sub").mkdir()
    edit_index(sharded, lambda table: table.update(a=name))
    with pytest.raises(ModelError, match="without any path"):
        open_shards(sharded, REFUSE)


def test_index_and_files_agree(sharded: Path) -> None:
    first, second = sorted(path.name for path in sharded.glob("*-of-*"))
    honest = (sharded / "model.safetensors.index.json").read_text()
    for change, message in (
        (lambda table: table.update(extra=first), "no tensor 'extra'"),
        (lambda table: table.update(a=second), f"'a' in .*has it in {second}|no tensor 'a'"),
        (lambda table: table.pop("a"), "'a' in .*has it in None"),
        (lambda table: table.update(a="none.safetensors"), "FileNotFoundError|'a' in"),
        (lambda table: table.clear(), "it maps tensors to files"),
    ):
        (sharded / "model.safetensors.index.json").write_text(honest)
        edit_index(sharded, change)
        with pytest.raises(ModelError, match=message):
            open_shards(sharded, REFUSE)
    for text in ("{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": "b", "a": "c"}}', "{"):
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError):
            open_shards(sharded, REFUSE)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no regular file"):
        open_shards(tmp_path, REFUSE)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match="no regular file"):
        open_shards(tmp_path, REFUSE)


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor its index, but nothing"):
        open_shards(tmp_path, REFUSE)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin[^$]*pickles[^$]*Convert them"):
        open_shards(tmp_path, REFUSE)
    with pytest.raises(ModelError, match=r"NotADirectoryError|FileNotFoundError"):
        open_shards(tmp_path / "pytorch_model.bin", REFUSE)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    shards = open_shards(tmp_path, REFUSE)
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(ModelError, match="changed since"):
        shards.tensor("w")
    path.unlink()
    with pytest.raises(ModelError, match="FileNotFoundError"):
        shards.tensor("w")


def test_a_bool_is_zero_or_one(tmp_path: Path) -> None:
    shards = open_shards(write(tmp_path, raw(one("BOOL", [3], [0, 3]), b"\0\1\2")), REFUSE)
    with pytest.raises(ModelError, match="above 1"):
        shards.tensor("w")
