"""transform_config as the library that defines it reads and runs it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mxtorq.errors import CheckpointError
from mxtorq.export.carried import (
    STORED_NAME,
    carried_matrices,
    matrix_name,
    stored_transform,
    transform_config,
)
from mxtorq.export.manifest import SiteEntry
from mxtorq.reading.documents import Refusal
from mxtorq.reading.shards import Shards, open_shards
from mxtorq.transforms.engine_matrix import EngineMatrix, engine_matrix
from mxtorq.transforms.rotation import Identity
from mxtorq.writing import write_tensors

WIDTH = 64


def entry(layer: int, site: str, *linears: str, kind: str = EngineMatrix.kind) -> SiteEntry:
    prefix = f"model.layers.{layer}"
    return SiteEntry(
        site=f"{prefix}.{site}",
        linears=[f"{prefix}.{linear}" for linear in linears],
        width=WIDTH,
        kind=kind,
        multiply_adds=0,
        extra_bytes=0,
        output_error=0.0,
    )


ENTRIES = [
    entry(1, "qkv_in", "self_attn.q_proj", "self_attn.k_proj"),
    entry(1, "o_in", "self_attn.o_proj", kind="identity"),
    entry(11, "qkv_in", "self_attn.q_proj", "self_attn.k_proj"),
]


def rotation(seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=draw)).Q


TRANSFORMS = {
    each.site: engine_matrix(WIDTH, rotation(number))
    if each.kind != "identity"
    else Identity(WIDTH)
    for number, each in enumerate(ENTRIES)
}


def test_names() -> None:
    stored = carried_matrices(ENTRIES, TRANSFORMS)
    assert list(stored) == [
        "model.layers.1.self_attn.q_proj.mxtorq_model_layers_1_qkv_in_input.weight",
        "model.layers.11.self_attn.q_proj.mxtorq_model_layers_11_qkv_in_input.weight",
    ]
    assert all(STORED_NAME.search(name) for name in stored)
    assert not STORED_NAME.search("model.layers.1.self_attn.q_proj.weight")
    assert all(each.dtype == torch.bfloat16 and each.shape == (32, 32) for each in stored.values())
    assert transform_config([ENTRIES[1]]) == {}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = (nn.Linear(WIDTH, 8, bias=False) for _ in range(3))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(12))


def test_the_library_runs_it_as_we_do() -> None:
    """The library keeps the matrix in float64 here, so it applies R sqrt(n) in BF16 over the root,
    which is M but for one rounding to BF16: 2^-9 of each entry."""
    library = pytest.importorskip("compressed_tensors.transform", reason="needs compressed-tensors")
    config = library.TransformConfig.model_validate(transform_config(ENTRIES))
    for scheme in config.config_groups.values():
        scheme.precision = torch.float64
    model = Model().double()
    plain = Model().double()
    plain.load_state_dict(model.state_dict())
    library.apply_transform_config(model, config)
    stored = carried_matrices(ENTRIES, TRANSFORMS)
    parameters = dict(model.named_parameters())
    for name, matrix in stored.items():
        with torch.no_grad():
            parameters[name].copy_(matrix.double())
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for number in range(12):
        layer = model.model.layers[number].self_attn
        origin = plain.model.layers[number].self_attn
        for leaf in ("q_proj", "k_proj", "o_proj"):
            weight = getattr(origin, leaf).weight
            got = getattr(layer, leaf)(x)
            if number in (1, 11) and leaf != "o_proj":
                transform = TRANSFORMS[f"model.layers.{number}.qkv_in"]
                expected = transform.apply(x) @ weight.T
                # |x| |M - M'| |w| by rows of blocks, with |M| <= 1 in each entry.
                bound = 2.0**-8 * x.abs().sum(1)[:, None] * weight.abs().sum(1)
                assert ((got - expected).abs() <= bound).all()
                assert not torch.allclose(got, x @ weight.T, rtol=0.1, atol=0.1)
            else:
                assert torch.equal(got, x @ weight.T)


def stored(tensors: dict[str, torch.Tensor], folder: Path) -> Shards:
    write_tensors(folder / "model.safetensors", tensors)
    refuse = Refusal(kind=CheckpointError, asked="the test", why="it", todo="mend it")
    return open_shards(folder, refuse)


def test_what_is_stored_is_the_transform_again(tmp_path: Path) -> None:
    matrices = carried_matrices(ENTRIES, TRANSFORMS)
    weights = stored(matrices, tmp_path)
    for each in ENTRIES:
        found = stored_transform(each, weights, None)
        assert torch.equal(found.matrix(), TRANSFORMS[each.site].matrix())
    del matrices[matrix_name(ENTRIES[0])]
    matrices[matrix_name(ENTRIES[2])] = torch.zeros(32, 31, dtype=torch.bfloat16)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    weights = stored(matrices, damaged)
    with pytest.raises(CheckpointError, match="or not whole"):
        stored_transform(ENTRIES[0], weights, None)
    with pytest.raises(CheckpointError, match="square matrix in BF16"):
        stored_transform(ENTRIES[2], weights, None)
