"""Tasks answered by vLLM, through the harness' backend for it: several GPUs, tensor parallelism.

The engine reads the folder itself, with our plugin where a checkpoint has online transforms, in the
dtype that the torch path computes in. The same prompts get the same answers up to the order of sums
in its kernels, which can turn an answer that was close.

It starts processes of its own and logs to standard error; ``VLLM_LOGGING_LEVEL`` is its option for
that. On a CPU the size of its cache is ``VLLM_CPU_KVCACHE_SPACE``, and the share of memory that it
would otherwise demand is set low.
"""

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.vllm_causallms import VLLM

from mxtorq.evaluation.harness import Counting, score_with
from mxtorq.evaluation.questions import Progress, Questions

AT_ONCE = 512
"""Prompts handed to the engine at once, which batches them itself: answers are counted in these."""

_SHARE_ON_A_CPU = 0.1


class EngineScorer(Counting, VLLM):
    """The harness' vLLM, which also counts answers and checks what it is asked."""


def score_by_engine(
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    window: int,
    questions: Questions,
    save: Callable[[str, dict[str, Any]], None],
    progress: Progress,
) -> None:
    """Ask the model in a folder as `harness.score_tasks` asks one in memory.

    Args:
        folder: a folder, or a hub id.
        dtype: what it computes in.
        device: whose kind the engine was built for.
        window: positions that the model was made for.
        questions: what to ask, and on how many devices.
        save: gets each result as soon as it is there.
        progress: told how far each task is.
    """
    plan = questions.plan
    options = {"gpu_memory_utilization": _SHARE_ON_A_CPU} if device.type == "cpu" else {}
    if device.type != "cpu":
        torch.accelerator.memory.empty_cache()
    progress("start vLLM", 0, 1)
    scorer = EngineScorer(
        pretrained=folder,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=window,
        tensor_parallel_size=plan.tensor_parallel,
        batch_size=plan.batch_size or AT_ONCE,
        **options,
    )
    progress("start vLLM", 1, 1)
    score_with(scorer, questions, save, progress)
