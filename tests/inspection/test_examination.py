"""Whole inspections: in memory and at rest, by site, with outliers, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

import mxtorq.inspection.examination
from mxtorq.config import EvaluationPlan, Recipe, parse_method
from mxtorq.errors import ModelError, TextError, UsageError
from mxtorq.formats.scales import NonOCPScale
from mxtorq.inspection.examination import inspect
from mxtorq.reports.imbalance import markdown, terminal
from mxtorq.reports.inspection import Inspection


def recipes(story: Path, *names: str, **more: object) -> list[Recipe]:
    settings: dict[str, object] = {
        "calibration": str(story),
        "calibration_tokens": 512,
        "seqlen": 64,
        **more,
    }
    return [Recipe(method=parse_method(name), **settings) for name in names]  # type: ignore[arg-type]


def test_an_inspection_is_whole_and_the_same_at_rest_and_in_memory(
    tiny_folders: dict[str, Path], story: Path
) -> None:
    model = str(tiny_folders["llama"])
    plan = EvaluationPlan(text=str(story), eval_tokens=128, seqlen=64)
    asked = recipes(story, "hadamard", "torq:levels=inter")
    calls: list[tuple[str, int, int]] = []
    rest = inspect(model, asked, device="cpu", progress=lambda *step: calls.append(step))
    memory = inspect(model, asked, device="cpu", harm=plan)
    assert rest == replace(memory, harm=[], evaluation=None)
    assert rest.methods == ["identity", "hadamard", "torq:levels=inter"]
    assert len(rest.sites) == 8
    assert [call for call in calls if call[0] == "measure"] == [("measure", n, 2) for n in range(3)]
    assert len(memory.harm) == 24
    assert Inspection.from_json(memory.to_json()) == memory
    for site in rest.sites:
        assert site.methods["torq:levels=inter"].inputs.max_over_mean < 1.001
        assert site.methods["identity"].inputs.rows == 512
        for token in site.massive_tokens:
            text = story.read_text()
            assert token.text in text
            assert 0 <= token.position < 64
    assert set(rest.residual_tokens) == {"model.layers.0", "model.layers.1"}
    assert "hurt the model most" in markdown(memory)
    assert len(terminal(memory, 100)) == 6


def test_methods_that_rotate_the_whole_model_get_a_pass_of_their_own(
    tiny_folders: dict[str, Path], story: Path
) -> None:
    plan = EvaluationPlan(text=str(story), eval_tokens=128, seqlen=64)
    model = str(tiny_folders["qwen3"])
    found = inspect(model, recipes(story, "quarot", "identity"), device="cpu", harm=plan)
    assert found.methods == ["identity", "quarot"]
    alone = inspect(model, recipes(story, "identity"), device="cpu", harm=plan)
    assert len(found.harm) == 2 * len(alone.harm) == 16
    for site, plain in zip(found.sites, alone.sites, strict=True):
        assert site.methods["identity"] == plain.methods["identity"]  # the original, unrotated
        assert site.methods["quarot"].inputs != plain.methods["identity"].inputs
    assert (
        max(each.kl for each in found.harm if each.method == "quarot") < 1
    )  # the function is kept


def test_sites_are_chosen_by_kind_and_by_name(tiny_folders: dict[str, Path], story: Path) -> None:
    found = inspect(
        str(tiny_folders["llama"]),
        recipes(story, "identity"),
        sites=("down_in", "model.layers.1.o_in"),
        device="cpu",
    )
    names = ["model.layers.0.down_in", "model.layers.1.o_in", "model.layers.1.down_in"]
    assert [site.site for site in found.sites] == names


def test_outliers_are_there_to_be_seen(tiny_folders: dict[str, Path], story: Path) -> None:
    model = str(tiny_folders["qwen3"])
    plain, wild = (
        inspect(model, recipes(story, "identity", outliers=name), device="cpu")
        for name in (None, "qwen3-0.6b")
    )
    louder = [
        other.methods["identity"].inputs.worst_channels[0].share
        > one.methods["identity"].inputs.worst_channels[0].share
        for one, other in zip(plain.sites, wild.sites, strict=True)
    ]
    assert all(louder)
    assert wild.outliers == "qwen3-0.6b"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(mxtorq.inspection.examination, "survey", never)


@pytest.mark.usefixtures("no_work")
def test_what_cannot_work_is_refused_before_any_work(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    model = str(tiny_folders["llama"])
    one = recipes(story, "identity")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(UsageError, match="differ in their method alone"):
        inspect(model, [*one, *recipes(story, "torq", seed=1)], device="cpu")
    with pytest.raises(UsageError, match="no recipe"):
        inspect(model, [], device="cpu")
    with pytest.raises(UsageError, match="log256"):
        inspect(model, [replace(one[0], scale_rule=NonOCPScale.LOG256)], device="cpu")
    with pytest.raises(UsageError, match="did you mean 'down_in'"):
        inspect(model, one, sites=("down_im",), device="cpu")
    with pytest.raises(UsageError, match="head"):
        inspect(model, recipes(story, "brq"), device="cpu")
    with pytest.raises(TextError):
        inspect(model, recipes(short, "identity"), device="cpu")
    with pytest.raises(TextError):
        plan = EvaluationPlan(text=str(short), seqlen=64)
        inspect(model, one, harm=plan, device="cpu")
    with pytest.raises(ModelError):
        inspect(str(tmp_path / "none"), one, device="cpu")


def test_a_real_model_with_sites_that_hold_no_blocks(data: Path) -> None:
    """Of stories260K, whose MLP is 172 wide, the other sites; TORQ levels each of them."""
    model = str(data / "models" / "stories260K")
    text = data / "text" / "tinystories_5k.jsonl"
    asked = recipes(text, "torq:levels=inter", allow_unfit=True)
    found = inspect(model, asked, device="cpu")
    assert len(found.unfit) == 5
    assert len(found.sites) == 15
    for site in found.sites:
        assert site.methods["torq:levels=inter"].inputs.max_over_mean < 1.001
    with pytest.raises(UsageError, match="stay in BF16"):
        inspect(model, asked, sites=("model.layers.0.down_in", "down_in"), device="cpu")
