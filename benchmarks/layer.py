"""What MXFP4 costs in the forward pass of one decoder layer, and how a linear holds its weight.

    python benchmarks/layer.py --dtype float32 --tokens 2048 --rounds 3 --json out.json

The layer has the sizes of Llama-3-8B (4096 wide, 14336 in the middle, 32 heads of which 8 have
keys) and random weights. Beside the plain layer stand layers whose linears are `MXFP4Linear` with
their weights kept dequantized, so that all that differs is what happens online: the transform and
the rounding of activations. "weights on the fly" dequantizes every weight in every call besides.
All take turns, A B C A B C; a ratio is the median over the turns of time over the plain layer's.

Linears are then timed by themselves, with few and many tokens, for each way to hold a weight: kept
in float32, kept in bfloat16, dequantized in each call, and multiplied as it is packed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels import dispatch
from mxtorq.models import FAMILIES
from mxtorq.surgery.fuse import quantize_site_
from mxtorq.surgery.linear import MXFP4Linear, linear_at
from mxtorq.transforms.base import Transform
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.rotation import BlockRotation, Identity
from mxtorq.transforms.torq.inter_block import equalize
from mxtorq.transforms.torq.rotation import TwoLevelRotation
from record import add_outputs, heading, provenance, table, write

SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attn_implementation": "sdpa",
}
TOKENS = (1, 16, 128, 2048)
PACKAGES = ("mxtorq", "torch", "transformers", "numpy", "numba")


def torq(width: int) -> Transform:
    """A full chain of B - 1 rotations, and a rotation within the blocks."""
    draw = torch.Generator().manual_seed(width)
    blocks = width // BLOCK
    root = torch.randn(blocks, 2 * blocks, dtype=torch.float64, generator=draw)
    root *= 1000 ** (torch.rand(blocks, 1, dtype=torch.float64, generator=draw) / 2)
    return TwoLevelRotation(width, equalize(root @ root.T), sylvester(BLOCK))


TRANSFORMS: dict[str, Callable[[int], Transform]] = {
    "identity": Identity,
    "hadamard": lambda width: BlockRotation(width, sylvester(BLOCK)),
    "torq": torq,
}


def decoder_layer(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A layer with random weights, and the rotary embedding that its callers give it."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(num_hidden_layers=1, vocab_size=64, **SIZES)
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(config, 0).to(dtype).eval().requires_grad_(False)
    return layer, LlamaRotaryEmbedding(config)


def quantized(transform: str, dtype: torch.dtype, keep: bool) -> nn.Module:
    """The layer with quantized linears; their weights are those of the plain layer, rounded."""
    layer, _ = decoder_layer(dtype)
    for site in FAMILIES["llama"].sites:
        linears = {path: linear_at(layer, path) for path in site.linears}
        width = next(iter(linears.values())).in_features
        codes = {path: dispatch.quantize(linear.weight) for path, linear in linears.items()}
        assert all(isinstance(found, MXFP4) for found in codes.values())
        fitted = TRANSFORMS[transform](width)
        quantize_site_(layer, site, fitted, codes, ScaleRule.FLOOR)
    for module in layer.modules():
        if isinstance(module, MXFP4Linear):
            module.keeps_weight = keep
    return layer


def take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, A B C A B C: CPU time on one thread, which other programs disturb
    least, and wall time on more. Callers have run each of them before."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            print(f"turn {turn + 1} of {rounds}: {name}", file=sys.stderr)
            started = clock()
            call()
            seconds[name].append(clock() - started)
    return seconds


def rows_of(
    operation: str, shape: str, dtype: torch.dtype, seconds: Mapping[str, list[float]]
) -> list[dict[str, Any]]:
    """Medians, and the ratio to the first call."""
    base = next(iter(seconds.values()))
    return [
        {
            "operation": operation,
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "by": name,
            "milliseconds": 1e3 * statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, base, strict=True)),
        }
        for name, own in seconds.items()
    ]


def measure_layer(
    dtype: torch.dtype, tokens: int, rounds: int, transforms: Iterable[str] = tuple(TRANSFORMS)
) -> list[dict[str, Any]]:
    """The plain layer and the quantized ones."""
    plain, rotary = decoder_layer(dtype)
    layers = {"plain": plain}
    layers |= {name: quantized(name, dtype, keep=True) for name in transforms}
    if "identity" in layers:
        layers["hadamard, weights on the fly"] = quantized("hadamard", dtype, keep=False)

    def call(layer: nn.Module, count: int) -> Callable[[], Any]:
        hidden = torch.randn(1, count, SIZES["hidden_size"]).to(dtype)
        positions = torch.arange(count)[None]
        embedded = rotary(hidden, positions)
        return partial(layer, hidden, position_ids=positions, position_embeddings=embedded)

    for layer in layers.values():
        call(layer, 64)()  # compiles, and dequantizes weights that are kept
    calls = {name: call(layer, tokens) for name, layer in layers.items()}
    shape = f"Llama-3-8B layer, {tokens} tokens"
    return rows_of("layer", shape, dtype, take_turns(calls, rounds))


def measure_linear(rounds: int, seed: int) -> list[dict[str, Any]]:
    """A 4096 x 4096 linear with each way to hold its weight, on rounded activations."""
    side = SIZES["hidden_size"]
    draw = torch.Generator().manual_seed(seed)
    codes = dispatch.quantize(torch.randn(side, side, generator=draw))
    assert isinstance(codes, MXFP4)
    wide, narrow = dispatch.dequantize(codes), dispatch.dequantize(codes, torch.bfloat16)
    rows = []
    for tokens in TOKENS:
        x = dispatch.fake_quantize(torch.randn(tokens, side, generator=draw))

        def fly(x: Tensor = x) -> Tensor:
            return nn.functional.linear(x, dispatch.dequantize(codes))

        calls: dict[str, Callable[[], Any]] = {
            "kept in float32": partial(nn.functional.linear, x, wide),
            "dequantized in each call": fly,
        }
        if tokens <= max(TOKENS[:-1]):  # slow with many tokens, by far
            calls["kept in bfloat16"] = partial(nn.functional.linear, x.bfloat16(), narrow)
        if dispatch.multiplies_packed(x):
            calls["packed"] = partial(dispatch.multiply_packed, x, codes)
        shape = f"{side} x {side}, {tokens} token{'s' if tokens > 1 else ''}"
        for call in calls.values():
            call()
        rows += rows_of("linear", shape, torch.float32, take_turns(calls, rounds))
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    columns = ["operation", "shape", "dtype", "by", "ms", "time / first"]
    lines = [
        [
            *(row[name] for name in ("operation", "shape", "dtype", "by")),
            f"{row['milliseconds']:.3g}",
            f"{row['ratio']:.3f}",
        ]
        for row in rows
    ]
    return table(columns, lines, 4)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each group")
    parser.add_argument("--seed", type=int, default=0)
    add_outputs(parser)
    args = parser.parse_args()
    if min(args.tokens, args.threads, args.rounds) < 1:
        parser.error("all numbers are positive")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    rows = measure_layer(getattr(torch, args.dtype), args.tokens, args.rounds)
    rows += measure_linear(args.rounds, args.seed)
    options = {name: getattr(args, name) for name in ("dtype", "tokens", "threads", "rounds")}
    schema = {"schema": "mxtorq.benchmarks.layer", "version": 1}
    record = {**schema, **provenance(PACKAGES), **options, "rows": rows}
    text = f"{args.threads} thread(s), medians of {args.rounds} turns."
    write(args, record, "\n\n".join([heading(record), text, report(rows)]))


if __name__ == "__main__":
    main()
