"""What a model that does not fit takes: peak memory and time of `quantize`, from disk to disk.

    python benchmarks/large_model.py --layers 32 --methods hadamard,torq --roundings rtn,rtn

Writes a checkpoint with the shape of Llama-3-8B and random BF16 weights, shard by shard, into a
folder that is removed again (16 GB for 32 layers), and quantizes it in a process of its own for
each method with its rounding. Its peak of resident memory is the operating system's figure for the
whole process, the libraries included. Random weights say nothing about quality.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from record import add_outputs, heading, provenance, table, write

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Llama-3-8B's config.json, as far as shapes go."""

PACKAGES = ("mxtorq", "torch", "transformers", "safetensors", "numpy", "numba")
CHILD = """
import json, resource, sys, time
from pathlib import Path
import torch
from mxtorq import Recipe, parse_method, parse_rounding, pipeline
folder, out, method, rounding, tokens, seqlen = sys.argv[1:]
recipe = Recipe(
    method=parse_method(method), rounding=parse_rounding(rounding), calibration="stdlib",
    calibration_tokens=int(tokens), seqlen=int(seqlen),
)
started = time.perf_counter()
manifest = pipeline.quantize(folder, Path(out), recipe, device="cpu")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - started, "peak_kib": peak}))
"""


def write_model(folder: Path, layers: int) -> int:
    """A checkpoint with random weights, a shard a layer; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    width, middle = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    values = SHAPE["num_key_value_heads"] * width // SHAPE["num_attention_heads"]
    draw = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)

    table: dict[str, str] = {}
    total = 0

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        table.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())

    for index in range(layers):
        shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (values, width),
            "self_attn.v_proj": (values, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (middle, width),
            "mlp.up_proj": (middle, width),
            "mlp.down_proj": (width, middle),
        }
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        shard(f"model-layer-{index:03d}.safetensors", tensors)
    for name in ("model.embed_tokens", "lm_head"):
        shard(f"model-{name}.safetensors", {f"{name}.weight": matrix(SHAPE["vocab_size"], width)})
    ones = torch.ones(width, dtype=torch.bfloat16)
    shard("model-norm.safetensors", {"model.norm.weight": ones})
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": table})
    (folder / "model.safetensors.index.json").write_text(index_text, encoding="utf-8")
    config = {**SHAPE, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with as_file(files("mxtorq.embedded") / "model") as reference:
        for path in reference.glob("tokenizer*"):
            shutil.copy(path, folder)
    return total


def main() -> None:
    """Write the model, quantize it, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--methods", default="hadamard", help="separated by commas")
    parser.add_argument("--roundings", default="rtn", help="one for each method")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--scratch", type=Path, help="a folder with room (default: the system's)")
    add_outputs(parser)
    args = parser.parse_args()
    runs = list(zip(args.methods.split(","), args.roundings.split(","), strict=True))
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        started = time.perf_counter()
        size = write_model(folder, args.layers)
        print(f"{size / 1e9:.1f} GB in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        for method, rounding in runs:
            out = Path(scratch) / "out"
            command = [sys.executable, "-c", CHILD, str(folder), str(out), method, rounding]
            command += [str(args.tokens), str(args.seqlen)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            written = sum(path.stat().st_size for path in out.iterdir())
            shutil.rmtree(out)
            rows.append({"method": method, "rounding": rounding, **found, "bytes": written})
    options = {name: getattr(args, name) for name in ("layers", "tokens", "seqlen")}
    schema = {"schema": "mxtorq.benchmarks.large_model", "version": 1}
    record = {**schema, **provenance(PACKAGES), **options, "model_bytes": size, "rows": rows}
    columns = ["method", "rounding", "peak GiB", "minutes", "checkpoint GB"]
    lines = [
        [
            *(row["method"], row["rounding"], f"{row['peak_kib'] / 2**20:.2f}"),
            *(f"{row['seconds'] / 60:.1f}", f"{row['bytes'] / 1e9:.2f}"),
        ]
        for row in rows
    ]
    text = (
        f"Shape of Llama-3-8B, {args.layers} layers, {size / 1e9:.1f} GB of random BF16 weights, "
        f"{args.tokens} tokens in windows of {args.seqlen}."
    )
    write(args, record, "\n\n".join([heading(record), text, table(columns, lines, 2)]))


if __name__ == "__main__":
    main()
