"""Tasks of the harness with their documents, found before a model is loaded or hours are spent.

A task that nobody has, a data set that cannot be had, a file that holds something else, a tokenizer
without what prompts begin with: each is an error of the first minute. Definitions are read from the
folders of the tasks that are asked; only a name that is not in `tasks.KNOWN` takes all 14,000 of
the harness, which is half a minute.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
from lm_eval.tasks import TaskManager

from mxtorq.errors import ModelError, UsageError
from mxtorq.evaluation.documents import (
    LocalTask,
    read_task,
    require_no_examples,
    write_task_file,
)
from mxtorq.evaluation.tasks import KNOWN, SUITES, Asked, TaskPlan
from mxtorq.specs import nearest

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The tasks of a plan with their documents, as the harness loads them."""

    plan: TaskPlan
    loaded: Mapping[str, Any]
    """What there is to ask, by label; tasks that are done are not there."""
    sha256: Mapping[str, str]
    """Of the files that documents come from, by the name of the task."""


@contextmanager
def opened(
    plan: TaskPlan, done: Mapping[str, dict[str, Any]], progress: Progress
) -> Iterator[Questions]:
    """Find the tasks of a plan and their documents, before hours of work and not after them.

    Args:
        plan: what to ask.
        done: results of an earlier run, by label.
        progress: told how far it is.

    Raises:
        UsageError: no such task, no documents, or documents that are not those of ``done``.
    """
    todo = [asked for asked in plan.tasks if asked.label not in done]
    local = {} if plan.files is None else _local_tasks(plan.tasks, plan.files, done)
    index = _index(todo, progress) if plan.files is None and todo else None
    loaded = {}
    with TemporaryDirectory() as scratch:
        if todo:  # a run that goes on after its last task has nothing to say here
            progress("documents", 0, len(todo))
        for number, asked in enumerate(todo, 1):
            with silence():
                if index is None:
                    folder = Path(scratch) / str(number)
                    folder.mkdir()
                    loaded[asked.label] = _from_file(local[asked.name], folder)
                else:
                    loaded[asked.label] = _from_hub(asked, index)
            progress("documents", number, len(todo))
        yield Questions(
            plan=plan,
            loaded=loaded,
            sha256={name: task.sha256 for name, task in local.items()},
        )


def require_tokens(tokenizer: Any, tasks: Sequence[Asked]) -> None:
    """Raises:
    ModelError: the harness puts something in front of prompts that this tokenizer does not have.
    """
    if tasks and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            asked=f"the tasks {', '.join(task.label for task in tasks)}",
            found="a tokenizer with neither a BOS nor an EOS token",
            why="the harness begins a text with BOS where nothing is in front of it, and looks "
            "whether prompts begin with it; where there is no BOS, it takes EOS",
            todo="set bos_token (or eos_token) in the model's tokenizer_config.json to the token "
            "that it was trained with",
        )
    chats = [task.label for task in tasks if task.name in KNOWN and KNOWN[task.name].chat]
    if chats and getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            asked=f"the tasks {', '.join(chats)}",
            found="a tokenizer without a chat template",
            why="these tasks are asked as a conversation with an instruction-tuned model",
            todo="take the instruction-tuned variant of the model, or other tasks",
        )


@contextmanager
def silence() -> Iterator[None]:
    """While this lasts, the harness and `datasets` print nothing and draw no bars of their own."""
    module: Any = lm_eval.api.task
    bars, log = module.tqdm, logging.getLogger("lm_eval")
    level, drawn = log.level, datasets.are_progress_bars_disabled()
    module.tqdm = lambda items, **options: items
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        module.tqdm = bars
        log.setLevel(level)
        if not drawn:
            datasets.enable_progress_bars()


def _local_tasks(
    tasks: tuple[Asked, ...], folder: Path, done: Mapping[str, dict[str, Any]]
) -> dict[str, LocalTask]:
    """The documents of all tasks, read before any is asked."""
    found: dict[str, LocalTask] = {}
    for asked in tasks:
        require_no_examples(asked, folder)
        found[asked.name] = task = read_task(asked.name, folder)
        earlier = done.get(asked.label, {}).get("documents_sha256", task.sha256)
        if earlier != task.sha256:
            raise UsageError(
                asked=f"to go on with an earlier record after {asked.label}",
                found=f"{task.path}, which has changed since",
                why="accuracies on other documents are not comparable",
                todo="put the earlier file back, or start a new record",
            )
    return found


def _index(tasks: list[Asked], progress: Progress) -> TaskManager:
    """The harness' definitions of these tasks; all of them where one is not known here."""
    root = Path(lm_eval.tasks.__file__).parent
    with silence():
        if all(asked.name in KNOWN for asked in tasks):
            folders = dict.fromkeys(root / KNOWN[asked.name].folder for asked in tasks)
            return TaskManager(include_defaults=False, include_path=list(folders))
        progress("read the harness' tasks", 0, 1)
        manager = TaskManager()
    progress("read the harness' tasks", 1, 1)
    for asked in tasks:
        if asked.name not in manager.all_tasks:
            near = nearest(asked.name, [*SUITES, *manager.all_tasks])
            raise UsageError(
                asked=f"the task {asked.name!r}",
                found=f"{len(manager.all_tasks):,} tasks of lm_eval {version('lm_eval')}, and "
                f"{', '.join(SUITES)}",
                why="none of them is called so",
                todo=f"did you mean {', '.join(near)}?" if near else "look at `lm_eval ls tasks`",
            )
        if asked.name in manager.all_tags:
            members = ",".join(sorted(manager.task_index[asked.name].tags))
            raise UsageError(
                asked=f"the task {asked.name!r}",
                found="a tag, under which the harness has several tasks and no result of its own",
                why="each result stands under its task's name",
                todo=f"name the tasks: --tasks {members:.500}",
            )
    return manager


def _from_hub(asked: Asked, index: TaskManager) -> Any:
    try:
        return index.load([asked.name])
    except Exception as error:  # datasets, the hub's client and HTTP share no root
        raise UsageError(
            asked=f"the documents of {asked.label} from the hub",
            found=f"{type(error).__name__}: {str(error)[:500]}",
            why="they are neither in the cache of `datasets` nor to be had over the network",
            todo="check the network (and HF_HUB_OFFLINE, HF_DATASETS_OFFLINE), or name a folder "
            "that has them: --task-files FOLDER",
        ) from error


def _from_file(task: LocalTask, scratch: Path) -> Any:
    write_task_file(task, scratch, Path(lm_eval.tasks.__file__).parent)
    return TaskManager(include_defaults=False, include_path=scratch).load([task.name])
