"""Every recipe in one table; killed runs go on; what cannot work is refused before any work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mxtorq.comparison
import tiny_models
from mxtorq.comparison import compare
from mxtorq.config import EvaluationPlan, Recipe, parse_method, parse_rounding
from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import NonOCPScale
from mxtorq.reports.intervals import difference
from mxtorq.reports.schema import Results

SMALL = {"calibration_tokens": 512, "seqlen": 64}


@pytest.fixture
def plan(story: Path) -> EvaluationPlan:
    return EvaluationPlan(text=str(story), eval_tokens=512, seqlen=64)


def recipe(story: Path, method: str = "identity", rounding: str = "rtn", **more: object) -> Recipe:
    settings: dict[str, object] = {
        "method": parse_method(method),
        "rounding": parse_rounding(rounding),
        "calibration": str(story),
        **SMALL,
        **more,
    }
    return Recipe(**settings)  # type: ignore[arg-type]


def test_a_table_over_methods_roundings_rules_seeds_and_outliers(
    tiny_folders: dict[str, Path], story: Path, plan: EvaluationPlan
) -> None:
    recipes = [
        recipe(story, method, rounding, scale_rule=rule, seed=seed, outliers=outliers)
        for outliers in (None, "qwen3-0.6b")
        for seed in (0, 1)
        for method, rounding, rule in (
            ("hadamard", "gptq", ScaleRule.EVEN),
            ("identity", "rtn", NonOCPScale.LOG256),
        )
    ]
    rows = compare(str(tiny_folders["llama"]), recipes, plan, device="cpu").rows
    bases = [row for row in rows if row.rounding is None]
    assert [row.outliers for row in bases] == [None, "qwen3-0.6b"]
    assert bases[0].perplexity == bases[1].perplexity  # powers of two change no bit
    made = [row for row in rows if row.rounding is not None]
    assert {(r.outliers, r.seed, r.method, r.rounding, r.scale_rule, r.ocp) for r in made} == {
        (outliers, seed, *rest)
        for outliers in (None, "qwen3-0.6b")
        for seed in (0, 1)
        for rest in (("hadamard", "gptq", "even", True), ("identity", "rtn", "log256", False))
    }
    for row in made:
        assert row.kl is not None
        assert row.kl > 0
        assert len(row.site_errors) == 8
        assert list(row.layer_errors) == ["model.layers.0", "model.layers.1"]
        assert {name: len(sums) for name, sums in row.windows.items()} == {
            "nll": 8,
            "kl": 8,
            "agreement": 8,
        }
        assert row.agreement is not None
        assert row.kl_p99 is not None
        assert row.kl_p99 > row.kl
        found = difference([row], [bases[row.outliers is not None]])
        assert found is not None
        assert found.mean == pytest.approx(row.nll - bases[0].nll, abs=1e-12)
        assert row.site_error == pytest.approx(sum(row.site_errors.values()) / 8, rel=1e-12)
        assert row.search_seconds is not None
        assert row.quantize_seconds is not None
        assert 0 <= row.search_seconds <= row.quantize_seconds
        costs = (row.multiply_adds_per_token, row.extra_bytes)
        expected = (2 * 32 * (64 + 64 + 64 + 96), 8 * 32 * 32 * 8)
        assert costs == (expected if row.method == "hadamard" else (0, 0))
        assert row.provenance["recipe"]["seed"] == row.seed
        assert len(row.provenance["weights_sha256"]) == 64


def test_a_killed_run_goes_on_with_the_same_rows(
    tiny_folders: dict[str, Path],
    story: Path,
    plan: EvaluationPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = str(tiny_folders["llama"])
    recipes = [recipe(story, name) for name in ("identity", "hadamard", "torq:levels=inter")]
    whole = compare(model, recipes, plan, device="cpu")
    saved: list[Results] = []

    def save(results: Results) -> None:
        saved.append(results)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(model, recipes, plan, device="cpu", save=save)
    done = Results.from_json(saved[-1].to_json())
    assert [row.method for row in done.rows] == ["bf16", "identity", "hadamard"]

    made: list[str] = []
    real = mxtorq.comparison.evaluate_recipe

    def counting(*args: object) -> object:
        made.append(args[1].method.__class__.__name__)  # type: ignore[attr-defined]
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(mxtorq.comparison, "evaluate_recipe", counting)
    resumed = compare(model, recipes, plan, device="cpu", done=done)
    assert made == ["TORQ"]
    timeless = [replace(r, search_seconds=None, quantize_seconds=None) for r in resumed.rows]
    assert timeless == [replace(r, search_seconds=None, quantize_seconds=None) for r in whole.rows]

    fewer = compare(model, recipes[:1], plan, device="cpu", done=done)
    assert [row.method for row in fewer.rows] == ["bf16", "identity", "hadamard"]  # none is lost


def test_a_recipe_that_is_named_twice_is_one_row_and_progress_counts_rows(
    tiny_folders: dict[str, Path], story: Path, plan: EvaluationPlan
) -> None:
    calls: list[tuple[str, int, int]] = []
    recipes = [recipe(story), recipe(story, "hadamard"), recipe(story)]
    rows = compare(
        str(tiny_folders["llama"]),
        recipes,
        plan,
        device="cpu",
        progress=lambda *step: calls.append(step),
    ).rows
    assert [row.method for row in rows] == ["bf16", "identity", "hadamard"]
    assert [call for call in calls if call[0] == "compare"] == [("compare", n, 2) for n in range(3)]
    assert ("hadamard rtn: quantize", 2, 2) in calls


def test_records_of_other_inputs_are_refused(
    tiny_folders: dict[str, Path], story: Path, plan: EvaluationPlan, tmp_path: Path
) -> None:
    model = str(tiny_folders["llama"])
    done = compare(model, [recipe(story)], plan, device="cpu")
    with pytest.raises(UsageError, match="different models or texts"):
        compare(model, [recipe(story)], replace(plan, eval_tokens=256), device="cpu", done=done)
    with pytest.raises(UsageError, match="different models or texts"):
        compare(str(tiny_folders["qwen3"]), [recipe(story)], plan, device="cpu", done=done)
    with pytest.raises(UsageError, match="different versions"):
        older = replace(done, versions={**done.versions, "torch": "1.0"})
        compare(model, [recipe(story)], plan, device="cpu", done=older)
    # Other weights under the same name.
    changed = tiny_models.save(tiny_models.build("llama", seed=5), tmp_path / "changed")
    disguised = tuple(
        replace(row, provenance={**row.provenance, "model": str(changed)}) for row in done.rows
    )
    with pytest.raises(UsageError, match="different models or texts"):
        compare(
            str(changed), [recipe(story)], plan, device="cpu", done=replace(done, rows=disguised)
        )


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("brq", "head"),
        ("hadamard:size=128", "128"),
        ("duquant", "block"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    method: str,
    message: str,
    tiny_folders: dict[str, Path],
    story: Path,
    plan: EvaluationPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(mxtorq.comparison, "measure", never)
    recipes = [recipe(story), recipe(story, method)]
    with pytest.raises(UsageError, match=message) as caught:
        compare(str(tiny_folders["llama"]), recipes, plan, device="cpu")
    assert caught.value.todo


def test_the_baseline_is_left_as_it_was(
    tiny_folders: dict[str, Path], story: Path, plan: EvaluationPlan
) -> None:
    """A method that rewrites the whole model works on a copy: the next row starts from BF16."""
    model = str(tiny_folders["qwen3"])
    alone = compare(model, [recipe(story)], plan, device="cpu").rows[-1]
    rows = compare(model, [recipe(story, "quarot"), recipe(story)], plan, device="cpu").rows
    after = rows[-1]
    assert (rows[1].layer_errors, len(after.layer_errors)) == ({}, 2)  # other coordinates
    assert after.perplexity == alone.perplexity
    assert torch.tensor(after.kl).item() == torch.tensor(alone.kl).item()
