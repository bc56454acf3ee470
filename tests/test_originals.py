"""A checkpoint beside the model that it was made from: compare's figures, and no other model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny_models
from command import here
from mxtorq import originals, pipeline
from mxtorq.comparison import compare
from mxtorq.config import EvaluationPlan, Recipe, parse_method
from mxtorq.errors import MxtorqError, UsageError
from mxtorq.export.targets import Target
from mxtorq.loading.checkpoint import load_checkpoint
from mxtorq.loading.source import load_source
from mxtorq.reports.schema import Results, Row

CPU = torch.device("cpu")


def recipe(story: Path, method: str, outliers: str | None = None) -> Recipe:
    return Recipe(
        method=parse_method(method),
        calibration=str(story),
        calibration_tokens=256,
        seqlen=64,
        outliers=outliers,
        seed=3,
    )


@pytest.fixture
def plan(story: Path) -> EvaluationPlan:
    return EvaluationPlan(text=str(story), eval_tokens=512, seqlen=64)


CASES = {
    ("qwen3", "hadamard", "qwen3-0.6b"): 2,  # a head that is tied, outliers that a seed places
    ("llama", "quarot", None): 0,  # the residual stream has other coordinates
}
"""Of (family, method, outliers) how many layers can be compared."""


@pytest.fixture(scope="module")
def checkpoints(
    tiny_folders: dict[str, Path], story: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str | None], Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for family, method, outliers in CASES:
        found[family, method, outliers] = out = root / method
        made = recipe(story, method, outliers)
        pipeline.quantize(str(tiny_folders[family]), out, made, device="cpu")
    return found


def figures(row: Row) -> dict[str, object]:
    names = ("perplexity", "kl", "kl_p99", "agreement", "windows", "layer_errors", "outliers")
    return {name: getattr(row, name) for name in names}


@pytest.mark.parametrize("case", CASES)
def test_the_rows_are_those_of_compare(
    case: tuple[str, str, str | None],
    checkpoints: dict[tuple[str, str, str | None], Path],
    tiny_folders: dict[str, Path],
    story: Path,
    plan: EvaluationPlan,
) -> None:
    family, method, outliers = case
    model = str(tiny_folders[family])
    compared = compare(model, [recipe(story, method, outliers)], plan, device="cpu").rows
    found = pipeline.evaluate(str(checkpoints[case]), plan, original=model, device="cpu").rows
    assert [row.method for row in found] == ["bf16", method]
    for ours, theirs in zip(found, compared, strict=True):
        assert figures(ours) == figures(theirs)
    assert found[0].provenance["weights_sha256"] == compared[0].provenance["weights_sha256"]
    assert found[1].provenance["original_sha256"] == compared[0].provenance["weights_sha256"]
    assert len(found[1].layer_errors) == CASES[case]


def test_other_rules_are_compared_with_the_original_too(
    checkpoints: dict[tuple[str, str, str | None], Path],
    tiny_folders: dict[str, Path],
    plan: EvaluationPlan,
) -> None:
    out, model = checkpoints["llama", "quarot", None], str(tiny_folders["llama"])
    rows = pipeline.evaluate(
        str(out), plan, original=model, targets=[Target.VLLM_EMULATION], device="cpu"
    ).rows
    assert [row.rules for row in rows] == [None, "floor", "floor/even"]
    assert rows[1].kl != rows[2].kl
    assert None not in (rows[1].kl, rows[2].kl)


def test_a_model_that_it_was_not_made_from(
    checkpoints: dict[tuple[str, str, str | None], Path],
    tiny_folders: dict[str, Path],
    plan: EvaluationPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def saved(name: str, seed: int = 0, **changes: object) -> str:
        return str(tiny_models.save(tiny_models.build("qwen3", seed, **changes), tmp_path / name))

    out = str(checkpoints["qwen3", "hadamard", "qwen3-0.6b"])
    rotated = str(checkpoints["llama", "quarot", None])
    wide = saved("wide", vocab_size=352)
    deep = saved("deep", num_hidden_layers=3, layer_types=None)
    for checkpoint, original, found in (
        (out, wide, "embed_tokens: 352 x 64 in"),
        (out, deep, "model.layers.2.self_attn.q_proj: 128 x 64 in"),
        (out, str(tiny_folders["llama"]), "q_proj: 64 x 64 in"),
        (out, saved("other", seed=5), "another length"),
        (rotated, str(tiny_models.save(tiny_models.build("llama", 5), tmp_path / "l")), "another"),
        (out, out, "already"),  # a checkpoint is nobody's original
    ):
        with pytest.raises(MxtorqError) as caught:
            pipeline.evaluate(checkpoint, plan, original=original, device="cpu")
        assert found in caught.value.found, original
        assert caught.value.todo
    with pytest.raises(UsageError, match="not quantized"):
        pipeline.evaluate(wide, plan, original=wide, device="cpu")
    monkeypatch.setattr(originals, "free_memory", lambda: 2000)
    with pytest.raises(UsageError, match="kB free"):
        pipeline.evaluate(out, plan, original=str(tiny_folders["qwen3"]), device="cpu")


def test_rotated_rows_keep_their_lengths_and_a_change_of_one_is_seen(
    checkpoints: dict[tuple[str, str, str | None], Path], tiny_folders: dict[str, Path]
) -> None:
    rotated, _ = load_checkpoint(checkpoints["llama", "quarot", None], CPU)
    original = load_source(str(tiny_folders["llama"]), CPU)
    originals.require_source(original, rotated, "llama")
    with torch.no_grad():
        rotated.model.get_submodule(rotated.family.embedding).weight[7] *= 1.02
    with pytest.raises(UsageError, match="that of token 7 has 2"):
        originals.require_source(original, rotated, "llama")


def test_answers_are_gone_on_with_behind_the_original_s_row(
    checkpoints: dict[tuple[str, str, str | None], Path],
    tiny_folders: dict[str, Path],
    plan: EvaluationPlan,
    tmp_path: Path,
) -> None:
    pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: the extra `tasks`")
    from mxtorq.evaluation.tasks import TaskPlan, parse_tasks

    (tmp_path / "piqa.jsonl").write_text('{"goal":"a","sol1":"b","sol2":"c","label":0}\n' * 2)
    tasks = TaskPlan(tasks=parse_tasks("piqa"), files=tmp_path)
    out, model = str(checkpoints["llama", "quarot", None]), str(tiny_folders["llama"])
    saved: list[Results] = []
    stages: list[str] = []

    def evaluate(original: str | None, done: Results | None) -> Results:
        stages.clear()
        return pipeline.evaluate(
            out,
            plan,
            original=original,
            tasks=tasks,
            done=done,
            save=saved.append,
            progress=lambda stage, done, total: stages.append(stage),
            device="cpu",
        )

    whole = evaluate(model, None)
    assert [(row.method, [*row.tasks]) for row in whole.rows] == [
        ("bf16", []),
        ("quarot", ["piqa"]),
    ]
    assert [len(each.rows) for each in saved] == [2, 2]
    assert evaluate(model, Results.from_json(saved[0].to_json())) == whole
    assert "evaluate" not in stages
    assert evaluate(None, whole) == whole  # nothing is lost
    alone = replace(whole, rows=whole.rows[1:])
    row = replace(alone.rows[0], provenance={**alone.rows[0].provenance, "original_sha256": None})
    with pytest.raises(UsageError, match="original_sha256 None there"):
        evaluate(model, replace(alone, rows=(row,)))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    pytest.importorskip("matplotlib", reason="needs the plotting library: the extra `report`")
    return tmp_path / "page.html"


def test_the_command_prints_and_draws_it(
    checkpoints: dict[tuple[str, str, str | None], Path],
    tiny_folders: dict[str, Path],
    story: Path,
    page: Path,
) -> None:
    out = checkpoints["qwen3", "hadamard", "qwen3-0.6b"]
    done = here(
        *("evaluate", out, "--original", tiny_folders["qwen3"], "--text", story),
        *("--seqlen", 64, "--eval-tokens", 512, "--report", page),
    )
    assert done.returncode == 0, done.stderr
    for said in ("bf16", "vs BF16", "fidelity to BF16", "same likeliest token"):
        assert said in done.stdout, said
    drawn = page.read_text(encoding="utf-8")
    assert "OCP MXFP4: fidelity to BF16" in drawn
    assert "Perplexity against BF16" in drawn
