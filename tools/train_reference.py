"""Train the small reference model that mxtorq carries, from nothing, on this machine.

The text is the ``train`` split of the standard library (see ``mxtorq.embedded.stdlib_text``); the
``evaluation`` split is only read at the end, to print the result. The architecture is Qwen3's
(grouped-query attention, QK-norm, tied head), small enough to travel inside the package.

    python tools/train_reference.py --steps 2000 --out src/mxtorq/embedded/model

``--shape llama`` trains one that nothing was developed on: Llama's architecture with other sizes
and a head of its own, for claims that have to hold on a model that was not looked at.

    python tools/train_reference.py --shape llama --steps 2000 --peak-lr 2e-3 --out LLAMA

The run is a function of its arguments, the Python version (its text) and the arithmetic of the
device; the figures of the committed model stand in docs/reference-model.md. ``--steps 20`` to a
scratch folder is a quick trial.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mxtorq.embedded.stdlib_text import Split, documents

BOS = "<|endoftext|>"
VOCABULARY = {"reference": 4096, "llama": 2048}
CONTEXTS = {"reference": 1024, "llama": 512}

# A line break takes the indentation that follows it along: in source text that pair is one word.
WORDS = r"\r?\n[ \t]*|[ ]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+"


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string has a tokenization, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS)


def token_stream(tokenizer: PreTrainedTokenizerFast, split: Split) -> torch.Tensor:
    """All documents of a split as one row of ids, each one opened by BOS."""
    ids: list[int] = []
    for text in documents(split):
        ids.append(tokenizer.bos_token_id)
        ids.extend(tokenizer.encode(text, add_special_tokens=False))
    return torch.tensor(ids)


def model_of(shape: str, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """A model with random weights."""
    common = {
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": CONTEXTS[shape],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-6,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "use_cache": True,
    }
    if shape == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=192,
                intermediate_size=512,
                num_hidden_layers=4,
                head_dim=32,
                tie_word_embeddings=False,
                **common,
            )
        )
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            head_dim=64,
            tie_word_embeddings=True,
            **common,
        )
    )


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 3 % of the run, then a cosine to a twentieth of the peak."""
    warm = max(1, steps * 3 // 100)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--shape", choices=sorted(CONTEXTS), default="reference")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4, help="windows of the context a step")
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out} exists; name a folder that does not")

    torch.manual_seed(args.seed)
    context = CONTEXTS[args.shape]
    tokenizer = train_tokenizer(documents("train"), VOCABULARY[args.shape])
    stream = token_stream(tokenizer, "train")
    model: Any = model_of(args.shape, tokenizer).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(stream):,} training tokens, {args.device}", flush=True)

    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    draw = torch.Generator().manual_seed(args.seed)

    model.train()
    started, running = time.time(), 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.peak_lr)
        starts = torch.randint(len(stream) - context, (args.batch,), generator=draw)
        ids = torch.stack([stream[s : s + context + 1] for s in starts.tolist()]).to(args.device)
        # BF16 arithmetic is a hundred times slower than FP32 on a CPU without its instructions.
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.device == "cuda"):
            loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % 10 == 9 or step == args.steps - 1:
            spent = time.time() - started
            left = spent / (step + 1) * (args.steps - step - 1)
            print(
                f"step {step + 1}/{args.steps}  loss {running:.4f}  "
                f"{(step + 1) * args.batch * context / spent:,.0f} tokens/s  "
                f"{left / 60:.1f} min left",
                flush=True,
            )

    model.eval().to(torch.bfloat16).float()
    held_out = token_stream(tokenizer, "evaluation")
    windows = held_out[: len(held_out) // context * context].view(-1, context)
    with torch.no_grad():
        losses = [loss_of(model, w[None].to(args.device)).item() for w in windows]
    perplexity = math.exp(sum(losses) / len(losses))
    print(f"perplexity on the evaluation split, {len(windows)} windows: {perplexity:.3f}")

    model.to("cpu", torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "generation_config.json").unlink(missing_ok=True)
    record = {
        "steps": args.steps,
        "batch": args.batch,
        "shape": args.shape,
        "context": context,
        "peak_lr": args.peak_lr,
        "seed": args.seed,
        "training_tokens": len(stream),
        "parameters": parameters,
        "evaluation_windows": len(windows),
        "evaluation_perplexity_bf16": round(perplexity, 4),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": args.device,
        "minutes": round((time.time() - started) / 60, 1),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
