"""What a model that does not fit takes: peak memory and time of `quantize`, from disk to disk.

    python benchmarks/large_model.py --shape llama-3-8b --methods hadamard,torq --roundings rtn,gptq

Writes a checkpoint with the shape of a known model and random BF16 weights, shard by shard, into a
folder that is removed again (16 GB for 32 layers of Llama-3-8B), and quantizes it in a process of
its own for each method with its rounding. Its peak of resident memory is the operating system's
figure for the whole process, the libraries included. Random weights say nothing about quality.
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

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
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
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
"""The config.json of models, as far as shapes go."""

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


def write_model(folder: Path, shape: dict[str, Any], layers: int) -> int:
    """A checkpoint with random weights, a shard a layer; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from mxtorq.loading.skeleton import empty_model, stored_names
    from mxtorq.models import FAMILIES

    config = {**shape, "num_hidden_layers": layers}
    family = next(f for f in FAMILIES.values() if f.model_type == shape["model_type"])
    model = empty_model(config, family)
    draw = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in stored_names(model, family):
        inside = name.removeprefix(f"{family.layers}.").split(".")[0]
        shard = f"layer-{int(inside):03d}" if inside.isdigit() else name.removesuffix(".weight")
        shards.setdefault(f"model-{shard}.safetensors", []).append(name)
    table: dict[str, str] = {}
    total = 0
    for file, names in shards.items():
        tensors = {}
        for name in names:
            made = torch.empty(model.get_parameter(name).shape, dtype=torch.bfloat16)
            # Norms are one.
            tensors[name] = (
                made.fill_(1) if made.dim() == 1 else made.normal_(0, 0.02, generator=draw)
            )
        save_file(tensors, folder / file, metadata={"format": "pt"})
        table.update(dict.fromkeys(names, file))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": table})
    (folder / "model.safetensors.index.json").write_text(index_text, encoding="utf-8")
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
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--methods", default="hadamard", help="separated by commas")
    parser.add_argument("--roundings", default="rtn", help="one for each method")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument(
        "--model", type=Path, help="where the model is kept, written once (default: nowhere)"
    )
    parser.add_argument("--scratch", type=Path, help="a folder with room (default: the system's)")
    add_outputs(parser)
    args = parser.parse_args()
    runs = list(zip(args.methods.split(","), args.roundings.split(","), strict=True))
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = args.model or Path(scratch) / "model"
        if args.model is None or not folder.exists():
            folder.mkdir()
            started = time.perf_counter()
            size = write_model(folder, SHAPES[args.shape], args.layers)
            print(f"{size / 1e9:.1f} GB in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        size = index["metadata"]["total_size"]
        for method, rounding in runs:
            out = Path(scratch) / "out"
            command = [sys.executable, "-c", CHILD, str(folder), str(out), method, rounding]
            command += [str(args.tokens), str(args.seqlen)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            written = sum(path.stat().st_size for path in out.iterdir())
            shutil.rmtree(out)
            rows.append({"method": method, "rounding": rounding, **found, "bytes": written})
    options = {name: getattr(args, name) for name in ("shape", "layers", "tokens", "seqlen")}
    schema = {"schema": "mxtorq.benchmarks.large_model", "version": 1}
    record = {**schema, **provenance(PACKAGES), **options, "model_bytes": size, "rows": rows}
    columns = ["method", "rounding", "peak GB", "minutes", "checkpoint GB"]
    lines = [
        [
            *(row["method"], row["rounding"], f"{row['peak_kib'] * 1024 / 1e9:.2f}"),
            *(f"{row['seconds'] / 60:.1f}", f"{row['bytes'] / 1e9:.2f}"),
        ]
        for row in rows
    ]
    text = (
        f"Shape of {args.shape}, {args.layers} layers, {size / 1e9:.1f} GB of random BF16 weights, "
        f"{args.tokens} tokens in windows of {args.seqlen}. 1 GB is 10^9 bytes."
    )
    write(args, record, "\n\n".join([heading(record), text, table(columns, lines, 2)]))


if __name__ == "__main__":
    main()
