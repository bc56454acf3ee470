"""Zero-shot accuracy through EleutherAI's lm-evaluation-harness, on a model in memory.

The harness does what it always does: its tasks make the prompts, its `HFLM` tokenizes, batches and
scores them, its metrics count. It is handed the transformers model whose linears were replaced, so
that a quantized model and the one it came from go the same way, and the BF16 row is what
``lm_eval --model hf`` gives for that model. Nothing of a task is written anew here.

What is added: one task after the other, each handed on as soon as it is finished; how far the
answers are, by the hook that the harness keeps for caches; the hash of all prompts, by which two
results are known to be of the same questions; and how many prompts were longer than the model's
window, of which the harness drops the beginning.

The harness talks on standard output, through `tqdm` and through a logger. It is silenced while it
works (see `silence`), which is the price of one line of progress with time left.

Needs the ``tasks`` extra. No code from a hub is run: data sets are read as data, and a task that
would run what a model writes is refused by the harness.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import lm_eval
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from torch import nn

from mxtorq.errors import ModelError, UsageError
from mxtorq.evaluation.questions import Progress, Questions, silence
from mxtorq.evaluation.tasks import KNOWN, Asked, metric_of

ON_A_CPU = 8
"""Prompts at once where ``auto`` has no memory to fill: more gain nothing on two cores, and padding
to the longest of a batch costs."""


class Counting:
    """What is added to a model of the harness: it counts answers and checks what it is asked."""

    truncated = 0
    """Prompts whose beginning was dropped."""
    task = "a task"

    def count_for(self: Any, task: str, told: Callable[[int, int], None]) -> None:
        """Begin a task: from now on ``told`` hears how many of its answers are there."""
        self.task, self.truncated = task, 0
        self.set_cache_hook(_Counter(told))

    def loglikelihood(self: Any, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """As the harness, without its bars; so the next two."""
        self.cache_hook.expect(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]

    def loglikelihood_rolling(self: Any, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.cache_hook.expect(len(requests))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)  # type: ignore[misc]

    def generate_until(self: Any, requests: list[Any], disable_tqdm: bool = True) -> Any:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                asked=f"answers to {self.task}, which the model writes",
                found="a tokenizer without an EOS token",
                why="the harness ends an answer where the model does, which is at EOS",
                todo="set eos_token in the model's tokenizer_config.json to the token that ended "
                "texts when it was trained, or leave that task away",
            )
        longest = max(each.args[1].get("max_gen_toks", self.max_gen_toks) for each in requests)
        if longest >= self.max_length:
            raise ModelError(
                asked=f"answers to {self.task} of up to {longest} tokens, written by the model",
                found=f"a model made for {self.max_length} positions",
                why="no room is left for the question",
                todo="leave that task away for this model",
            )
        self.cache_hook.expect(len(requests))
        return super().generate_until(requests, disable_tqdm=True)  # type: ignore[misc]

    def _loglikelihood_tokens(self: Any, requests: list[Any], *more: Any, **options: Any) -> Any:
        window = self.max_length
        for _, context, answer in requests:
            if len(answer) > window:
                raise ModelError(
                    asked=f"the probability of an answer in {self.task}",
                    found=f"an answer of {len(answer)} tokens, a model made for {window} positions",
                    why="not even the answer fits in front of the model",
                    todo="leave that task away for this model",
                )
            self.truncated += len(context) + len(answer) > window + 1
        return super()._loglikelihood_tokens(requests, *more, **options)  # type: ignore[misc]


class Scorer(Counting, HFLM):
    """The harness' own model, on a module in memory."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int | str) -> None:
        """As the harness wraps a model that is in memory already."""
        # The harness gives the tokenizer a padding token.
        super().__init__(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch_size)


class _Counter:
    """What the harness takes for its cache of answers."""

    def __init__(self, told: Callable[[int, int], None]) -> None:
        self._told, self._done, self._total = told, 0, 0

    def expect(self, answers: int) -> None:
        """So many answers more."""
        self._total += answers
        self._told(self._done, self._total)

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """An answer is there."""
        self._done += 1
        self._told(self._done, self._total)


def score_tasks(
    model: nn.Module,
    tokenizer: Any,
    questions: Questions,
    save: Callable[[str, dict[str, Any]], None],
    progress: Progress,
) -> None:
    """Ask a model, and hand over the result of each task by its label (see `docs/results.md`).

    Args:
        model: a transformers causal language model, where it computes.
        tokenizer: its tokenizer; stays as it is.
        questions: what to ask.
        save: gets each result as soon as it is there.
        progress: told how far each task is.

    Raises:
        ModelError: an answer is longer than the model's window.
    """
    cpu = next(model.parameters()).device.type == "cpu"
    with silence():
        size = questions.plan.batch_size or (ON_A_CPU if cpu else "auto")
        scorer = Scorer(model, tokenizer, size)
    score_with(scorer, questions, save, progress)


def score_with(
    scorer: Any,
    questions: Questions,
    save: Callable[[str, dict[str, Any]], None],
    progress: Progress,
) -> None:
    """As `score_tasks`, of any model of the harness that is `Counting`."""
    plan = questions.plan
    for asked in plan.tasks:
        if asked.label not in questions.loaded:
            continue
        progress(asked.label, 0, 1)
        with silence():
            scorer.count_for(asked.label, partial(progress, asked.label))
            result = _ask(scorer, asked, questions.loaded[asked.label], plan.limit)
        if asked.name in questions.sha256:
            result["documents_sha256"] = questions.sha256[asked.name]
        save(asked.label, result)


def _ask(scorer: Any, asked: Asked, loaded: Any, limit: int | None) -> dict[str, Any]:
    """The result of a task, as `simple_evaluate` of the harness comes to it."""
    chat = asked.name in KNOWN and KNOWN[asked.name].chat
    tasks = loaded["tasks"]
    for task in tasks.values():
        if asked.shots is not None:
            task.set_config("num_fewshot", asked.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        if {"acc", "perplexity"} == task.aggregation().keys():
            # LAMBADA's second metric takes minutes of resampling for its standard error.
            task.override_metric("acc")
    found: Any = lm_eval.evaluate(
        lm=scorer,
        task_dict=loaded,
        limit=limit,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    figures = found["results"][asked.name]
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in figures.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    if not metrics:
        raise UsageError(
            asked=f"the task {asked.name!r}",
            found=f"a group of {len(tasks)} tasks without a result of its own",
            why="each result stands under its task's name",
            todo=f"name the tasks: --tasks {','.join(tasks):.500}",
        )
    metric = metric_of(asked.name, metrics)
    name, _, chosen = metric.partition(",")
    stderr = figures.get(f"{name}_stderr,{chosen or 'none'}")
    return {
        "metric": metric,
        "value": metrics[metric],
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        "metrics": metrics,
        "documents": sum(count["effective"] for count in found["n-samples"].values()),
        "shots": max(found["n-shot"][name] for name in tasks),
        "version": str(found["versions"].get(asked.name)),
        "truncated": scorer.truncated,
        "prompts_sha256": _prompts(tasks),
    }


def _prompts(tasks: Mapping[str, Any]) -> str:
    """SHA-256 over everything that the model was asked: tasks by name, documents in their order."""
    digest = hashlib.sha256()
    for name in sorted(tasks):
        for instance in tasks[name].instances:
            digest.update(json.dumps(instance.args, default=str).encode())
    return digest.hexdigest()
