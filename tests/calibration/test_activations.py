"""In memory, on disk or read again by another process: a layer gets the same bits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny_models
from mxtorq.calibration.activations import StoredInput, stored_inputs
from mxtorq.calibration.capture import (
    LayerInput,
    advance_,
    capture_hessians,
    capture_sites,
    each_first_input,
)
from mxtorq.errors import CheckpointError
from mxtorq.models.family import Family
from mxtorq.writing import fingerprint, write_tensors

CPU = torch.device("cpu")
NEVER, ALWAYS = 0, 2**40
TOKENS = 5 * 32


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_models.build("qwen3")


FAMILY: Family = tiny_models.FAMILIES["qwen3"]


def first(model: torch.nn.Module, copies: int = 3) -> Iterator[LayerInput]:
    """Batches of different sizes."""
    for number in range(copies):
        windows = tiny_models.tokens(1 + number % 2, 32, seed=number)
        yield from each_first_input(model, FAMILY, windows, CPU, torch.float32)


def captured(model: torch.nn.Module, index: int, inputs: list[StoredInput]) -> list[torch.Tensor]:
    layer = model.get_submodule(f"{FAMILY.layers}.{index}")
    sites = {FAMILY.site_name(index, site): site for site in FAMILY.sites}
    statistics = capture_sites(layer, sites, inputs, 0)
    through = dict.fromkeys(sites, torch.abs)
    hessians = capture_hessians(layer, sites, inputs, through)
    return [
        *(each.hessian for each in statistics.values()),
        *(each.sample for each in statistics.values()),
        *hessians.values(),
    ]


def bits(model: torch.nn.Module, inputs: list[StoredInput], start: int = 0) -> list[torch.Tensor]:
    """What both layers see, and what comes out."""
    found = []
    for index in range(start, 2):
        found += captured(model, index, inputs)
        advance_(model.get_submodule(f"{FAMILY.layers}.{index}"), inputs)
    return [*found, *(item.hidden for item in inputs)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_spilled_states_are_those_in_memory(model: torch.nn.Module, tmp_path: Path) -> None:
    plain = list(first(model))
    for name in ("kept", "spilled"):
        (tmp_path / name).mkdir()
    kept = stored_inputs(first(model), tmp_path / "kept", 0, TOKENS, ALWAYS)
    spilled = stored_inputs(first(model), tmp_path / "spilled", 0, TOKENS, NEVER)
    assert listing(tmp_path / "kept") == []
    assert listing(tmp_path / "spilled") == [f"00000-{n:05d}.safetensors" for n in range(3)]
    assert [item.tokens for item in kept] == [item.tokens for item in plain] == [32, 64, 32]
    expected = bits(model, plain)  # type: ignore[arg-type]
    assert equal(bits(model, kept), expected)
    assert equal(bits(model, spilled), expected)
    for name, inputs in (("kept", kept), ("spilled", spilled)):
        for item in inputs:
            assert item.path.parent == tmp_path / name
            assert item.path.name.startswith("00002-")
            assert item.facts == fingerprint(item.path)


def test_the_limit_counts_all_batches(model: torch.nn.Module, tmp_path: Path) -> None:
    size = TOKENS * 64 * 4
    for memory, files in ((size, []), (size - 1, ["00000-00000.safetensors"])):
        folder = tmp_path / str(memory)
        folder.mkdir()
        stored_inputs(first(model, 1), folder, 0, TOKENS, memory)
        assert listing(folder) == files


@pytest.mark.parametrize("memory", [NEVER, ALWAYS])
@pytest.mark.parametrize("earlier", [NEVER, ALWAYS])
def test_another_process_goes_on(
    earlier: int, memory: int, model: torch.nn.Module, tmp_path: Path
) -> None:
    before = stored_inputs(first(model), tmp_path, 0, TOKENS, earlier)
    captured(model, 0, before)
    advance_(model.get_submodule(f"{FAMILY.layers}.0"), before)
    resumed = stored_inputs(first(model), tmp_path, 1, TOKENS, memory)
    assert equal([item.hidden for item in resumed], [item.hidden for item in before])
    assert equal(bits(model, resumed, start=1), bits(model, before, start=1))


def test_states_of_half_precision_come_back_as_they_were(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    batch = next(first(model))
    batch.hidden = batch.hidden.bfloat16()
    item = StoredInput(tmp_path, 0, batch, 0, keep=False)
    assert item.hidden.dtype == torch.bfloat16
    assert torch.equal(item.hidden, batch.hidden)
    assert item.hidden.data_ptr() != item.hidden.data_ptr()  # nothing is held


@pytest.mark.parametrize(
    "damage", ["missing", "shape", "dtype", "name", "flip", "cut", "replaced", "later"]
)
def test_files_that_are_not_as_they_were_written(
    damage: str, model: torch.nn.Module, tmp_path: Path
) -> None:
    batch = next(first(model))
    item = StoredInput(tmp_path, 0, batch, 0, keep=False)
    content = bytearray(item.path.read_bytes())
    if damage == "later":
        assert torch.equal(item.hidden, batch.hidden)  # it was right once
        content[-1] ^= 1
    item.path.unlink()
    if damage == "shape":
        write_tensors(item.path, {"hidden": batch.hidden[:, :-1]})
    elif damage == "dtype":
        write_tensors(item.path, {"hidden": batch.hidden.view(torch.int32)})
    elif damage == "name":
        write_tensors(item.path, {"other": batch.hidden})
    elif damage == "replaced":
        write_tensors(item.path, {"hidden": batch.hidden * 2})
    elif damage != "missing":
        content[-1] ^= damage == "flip"
        item.path.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(CheckpointError, match="activations of an unfinished run"):
        _ = item.hidden
    if damage in ("missing", "shape", "dtype", "name", "cut"):  # without a hash to compare, too
        if item.path.exists():
            item.path.rename(tmp_path / "00001-00000.safetensors")
        with pytest.raises(CheckpointError, match="remove the folder of the unfinished run"):
            StoredInput(tmp_path, 0, batch, 1, keep=True)
