"""Which tasks of EleutherAI's lm-evaluation-harness a model is asked, and what papers average.

Tasks are the harness' own, by the harness' names: prompts, few-shot examples and metrics are its
definitions, and nothing here repeats them. What stands here is what a paper says *about* them:
which of a task's metrics it takes and which tasks go into its average.

    acc7    DuQuant++ (arXiv 2604.17789, table 1; the task list and the metrics are its released
            evaluation's): seven tasks without examples, acc_norm where a task has it, else acc
    acc5    the five tasks of the comparison of methods under OCP scales (arXiv 2609.34680),
            acc_norm but for WinoGrande. It asked the 299 validation questions of ARC-Challenge; the
            harness' task, and so this average, the 1,172 test questions
    acc4    MR-GPTQ (arXiv 2509.23202, after arXiv 2411.02355): MMLU with chains of thought and
            GSM8K, both through the chat template, HellaSwag with ten examples, WinoGrande with
            five. For instruction-tuned models: the first two generate

An average is the plain mean. It is given when all of its tasks were asked, under whatever name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxtorq.errors import UsageError
from mxtorq.specs import unknown


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of one of the harness' tasks."""

    metric: str
    """The harness' key without the filter "none": ``acc_norm``, ``exact_match,strict_match``."""
    folder: str
    """Where the harness defines it, below its own tasks: reading all 14,000 takes half a minute."""
    chat: bool = False
    """Asked through the chat template of the tokenizer, examples as turns."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A task of the harness as somebody asks for it."""

    name: str
    shots: int | None = None
    """Examples in front of each question; None: as the harness' definition says, mostly none."""

    @property
    def label(self) -> str:
        """What `parse_tasks` reads it from."""
        return self.name if self.shots is None else f"{self.name}:shots={self.shots}"


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """Tasks, and where their documents come from."""

    tasks: tuple[Asked, ...]
    files: Path | None = None
    """A folder of documents; None: the hub, or what the `datasets` library has cached of it."""
    limit: int | None = None
    """Documents of each task, the first ones: to try things out."""
    batch_size: int | None = None
    """Prompts at once; None: found automatically on an accelerator, `harness.ON_A_CPU` on a CPU."""
    engine: str = "torch"
    """Who answers: ``torch``, the model in memory, or ``vllm``, from its folder."""
    tensor_parallel: int = 1
    """Devices of vLLM."""

    def __post_init__(self) -> None:
        if self.engine not in ("torch", "vllm"):
            raise unknown("engine", self.engine, ["torch", "vllm"])
        if self.engine == "torch" and self.tensor_parallel != 1:
            raise UsageError(
                asked=f"--tensor-parallel {self.tensor_parallel}",
                found="the engine torch, which computes on one device",
                why="a model is divided among several by vLLM alone",
                todo="add --engine vllm, or leave --tensor-parallel away",
            )
        options = {
            "--limit": self.limit,
            "--batch-size": self.batch_size,
            "--tensor-parallel": self.tensor_parallel,
        }
        for option, value in options.items():
            if value is not None and value < 1:
                raise UsageError(
                    asked=f"{option} {value}",
                    found="a number below 1",
                    why="a task is asked in whole documents",
                    todo=f"pass a positive number, or leave {option} away",
                )

    def record(self) -> dict[str, Any]:
        """What results of different plans must not be mixed over."""
        return {
            "documents": "hub" if self.files is None else "files",
            "limit": self.limit,
            "engine": self.engine,
        }


KNOWN = {
    "arc_challenge": Known(metric="acc_norm", folder="arc"),
    "arc_easy": Known(metric="acc_norm", folder="arc"),
    "boolq": Known(metric="acc", folder="super_glue/boolq"),
    "gsm8k_llama": Known(
        metric="exact_match,strict_match", folder="llama3/instruct/gsm8k", chat=True
    ),
    "hellaswag": Known(metric="acc_norm", folder="hellaswag"),
    "lambada_openai": Known(metric="acc", folder="lambada"),
    "mmlu": Known(metric="acc", folder="mmlu/default"),
    "mmlu_cot_llama": Known(
        metric="exact_match,strict_match", folder="llama3/instruct/mmlu_cot", chat=True
    ),
    "openbookqa": Known(metric="acc_norm", folder="openbookqa"),
    "piqa": Known(metric="acc_norm", folder="piqa"),
    "winogrande": Known(metric="acc", folder="winogrande"),
}
"""Any other task of the harness can be named too: see `metric_of`."""

SUITES = {
    "acc7": tuple(
        Asked(name=name)
        for name in (
            *("arc_easy", "arc_challenge", "winogrande", "hellaswag", "openbookqa"),
            *("lambada_openai", "piqa"),
        )
    ),
    "acc5": tuple(
        Asked(name=name)
        for name in ("arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")
    ),
    "acc4": (
        Asked(name="mmlu_cot_llama"),
        Asked(name="gsm8k_llama"),
        Asked(name="hellaswag", shots=10),
        Asked(name="winogrande", shots=5),
    ),
}


def parse_tasks(text: str) -> tuple[Asked, ...]:
    """The tasks that ``acc7,piqa,hellaswag:shots=10`` names, each once, in that order.

    Names that are neither in `KNOWN` nor in `SUITES` may be the harness' and are looked up there.

    Raises:
        UsageError: no task, or an option that no task has.
    """
    asked: list[Asked] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        asked += SUITES[item] if item in SUITES else [_parse_task(item)]
    if not asked:
        raise UsageError(
            asked=f"--tasks {text!r}",
            found="no name",
            why="there is nothing to ask",
            todo=f"name some of {', '.join([*SUITES, *KNOWN])}, or others of the harness",
        )
    return tuple(dict.fromkeys(asked))


def metric_of(name: str, metrics: Mapping[str, float]) -> str:
    """The metric that stands for a task: the one of `KNOWN`, else acc_norm, acc, or the first."""
    if name in KNOWN:
        return KNOWN[name].metric
    usual = (metric for metric in ("acc_norm", "acc") if metric in metrics)
    return next(usual, next(iter(metrics)))


def averages(accuracies: Mapping[str, float]) -> dict[str, float]:
    """The mean of every suite whose tasks, by label, are all there."""
    labels = {suite: [task.label for task in tasks] for suite, tasks in SUITES.items()}
    return {
        suite: sum(accuracies[label] for label in members) / len(members)
        for suite, members in labels.items()
        if all(label in accuracies for label in members)
    }


def _parse_task(item: str) -> Asked:
    name, *options = item.split(":")
    shots = None
    for option in options:
        key, _, value = option.partition("=")
        if key != "shots":
            raise unknown(f"option of the task {name!r}", key, ["shots"])
        if not (value.isascii() and value.isdigit() and len(value) < 4):
            raise UsageError(
                asked=f"the task {item!r}",
                found=f"{value!r} examples",
                why="examples in front of a question are a whole number from 0 to 999",
                todo=f"write {name}:shots=5",
            )
        shots = int(value)
    return Asked(name=name, shots=shots)
