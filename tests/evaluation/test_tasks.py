"""What is asked, under which names, and what the averages are of."""

import pytest

from mxtorq.errors import UsageError
from mxtorq.evaluation.tasks import (
    KNOWN,
    SUITES,
    Asked,
    TaskPlan,
    averages,
    metric_of,
    parse_tasks,
)


def test_names_stand_for_tasks() -> None:
    assert parse_tasks("piqa, hellaswag:shots=10,piqa") == (
        Asked(name="piqa"),
        Asked(name="hellaswag", shots=10),
    )
    assert [asked.label for asked in parse_tasks("boolq,acc5,arc_easy")] == [
        *("boolq", "arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")
    ]
    for suite in SUITES:
        labels = ",".join(asked.label for asked in parse_tasks(suite))
        assert parse_tasks(labels) == SUITES[suite]  # labels are read back
    assert parse_tasks("some_task_of_theirs")[0].name == "some_task_of_theirs"


@pytest.mark.parametrize("text", ["", " , ", "piqa:shots=", "piqa:shots=-1", "piqa:shot=1"])
def test_what_is_no_task_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_tasks(text)
    assert "shots" in str(caught.value) or "acc7" in caught.value.todo


def test_the_papers_averages() -> None:
    """By hand: which tasks, which metric, plain means."""
    assert {KNOWN[asked.name].metric for asked in SUITES["acc7"]} == {"acc", "acc_norm"}
    plain = [name for name, known in KNOWN.items() if known.metric == "acc"]
    assert plain == ["boolq", "lambada_openai", "mmlu", "winogrande"]
    values = {
        "arc_easy": 0.1,
        "arc_challenge": 0.2,
        "winogrande": 0.3,
        "hellaswag": 0.4,
        "openbookqa": 0.5,
        "lambada_openai": 0.6,
        "piqa": 0.7,
        "boolq": 1.0,
    }
    assert averages(values) == pytest.approx({"acc7": 2.8 / 7, "acc5": 1.7 / 5}, rel=1e-15)
    assert averages({**values, "mmlu_cot_llama": 0.5, "gsm8k_llama": 0.5}).keys() == {
        *("acc7", "acc5")  # acc4 wants HellaSwag with ten examples and WinoGrande with five
    }
    of_four = dict.fromkeys(
        ("mmlu_cot_llama", "gsm8k_llama", "hellaswag:shots=10", "winogrande:shots=5"), 0.25
    )
    assert averages(of_four) == {"acc4": 0.25}
    assert averages({name: 1.0 for name in values if name != "piqa"}) == {}


def test_the_metric_that_stands_for_a_task() -> None:
    assert metric_of("lambada_openai", {"perplexity": 5.0, "acc": 0.5}) == "acc"
    assert metric_of("other", {"f1": 0.1, "acc": 0.5, "acc_norm": 0.6}) == "acc_norm"
    assert metric_of("other", {"f1": 0.1, "acc": 0.5}) == "acc"
    assert metric_of("other", {"f1": 0.1, "bleu": 0.5}) == "f1"


@pytest.mark.parametrize("option", ["limit", "batch_size", "tensor_parallel"])
def test_numbers_are_positive(option: str) -> None:
    with pytest.raises(UsageError, match=option.replace("_", "-")):
        TaskPlan(tasks=(Asked(name="piqa"),), engine="vllm", **{option: 0})  # type: ignore[arg-type]


def test_engines() -> None:
    with pytest.raises(UsageError, match="did you mean 'vllm'"):
        TaskPlan(tasks=(), engine="vlm")
    with pytest.raises(UsageError, match="--engine vllm"):
        TaskPlan(tasks=(), tensor_parallel=2)
