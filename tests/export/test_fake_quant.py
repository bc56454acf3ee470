"""Plain folders hold the exact values of the codes, and say that they are not W4A4."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mxtorq.errors import FormatError, UsageError
from mxtorq.export.convert import export
from mxtorq.export.fake_quant import fake_quantized, undo
from mxtorq.export.packed import read_packed
from mxtorq.formats.e2m1 import pack
from mxtorq.formats.mxfp4 import MXFP4, dequantize
from mxtorq.reading.documents import Refusal
from mxtorq.reading.shards import open_shards
from mxtorq.transforms.block_matrices import BlockMatrices

REFUSE = Refusal(kind=FormatError, asked="", why="", todo="")


def one_block(code: int, scale: int) -> MXFP4:
    codes = torch.full((1, 32), code, dtype=torch.uint8)
    return MXFP4(pack(codes), torch.tensor([[scale]], dtype=torch.uint8))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_values_are_exact_and_transformers_loads_them(
    quantized: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    source = read_packed(quantized(family))
    done = export(source.folder, tmp_path / "plain", "fake-quant")
    assert "W4A16" in done.notes[0]
    stored = open_shards(tmp_path / "plain", REFUSE)
    assert len(stored.names) == len(source.linears) + len(source.plain)
    for linear in source.linears:
        values = stored.tensor(f"{linear}.weight")
        assert values.dtype == torch.bfloat16
        assert torch.equal(values.float(), dequantize(source.codes(linear)))
    for name in source.plain:
        assert torch.equal(stored.tensor(name), source.shards.tensor(name))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "not of W4A4" in config["mxtorq_fake_quant"]
    assert "not of W4A4" in (tmp_path / "plain" / "README.md").read_text()
    _, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_every_code_and_scale_is_exact() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).expand(253, 32).contiguous()
    every = MXFP4(pack(codes), torch.arange(253, dtype=torch.uint8)[:, None])
    values = fake_quantized(every, "w")
    assert torch.equal(values.double(), dequantize(every, torch.float64))


def test_what_lies_beyond_bf16_is_refused() -> None:
    refused = []
    for scale in (252, 253, 254, 255):
        for code in range(8):
            try:
                fake_quantized(one_block(code, scale), "w")
            except FormatError:
                refused.append((scale, code))
    # 4 and more times 2^126, 2 and more times 2^127, and every NaN
    overflows = [(253, code) for code in (6, 7)] + [(254, code) for code in (4, 5, 6, 7)]
    assert refused == overflows + [(255, code) for code in range(8)]


def test_transforms_are_undone_only_when_asked(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    source = read_packed(quantized("qwen3", "wush"))
    with pytest.raises(UsageError, match="--undo-transforms"):
        export(source.folder, tmp_path / "plain", "fake-quant")
    assert not list(tmp_path.iterdir())
    done = export(source.folder, tmp_path / "plain", "fake-quant", undo_transforms=True)
    assert "once more" in done.notes[1]
    stored = open_shards(tmp_path / "plain", REFUSE)
    assert source.online
    for entry in source.online:
        back = source.transform(entry).matrix().T
        for linear in entry.linears:
            exact = dequantize(source.codes(linear), torch.float64) @ back
            found = stored.tensor(f"{linear}.weight").double()
            # Half a step of BF16, and the float64 sums in another order.
            noise = 1e-12 * exact.abs().max()
            assert bool(((found - exact).abs() <= exact.abs() * (2**-8 + 2**-23) + noise).all())


def test_undo_is_the_inverse_of_fuse() -> None:
    draw = torch.Generator().manual_seed(0)
    matrices = torch.eye(32, dtype=torch.float64) + 0.1 * torch.randn(
        2, 32, 32, generator=draw, dtype=torch.float64
    )
    transform = BlockMatrices(matrices)
    weight = torch.randn(5, 64, generator=draw, dtype=torch.float64)
    again = undo(transform.fuse(weight), transform)
    # 64 products, a solve of condition below 100: far below 1e-10.
    assert (again - weight).abs().max() < 1e-10
