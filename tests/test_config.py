"""Recipes are validated at birth, and method names go to objects and back."""

from dataclasses import FrozenInstanceError, dataclass

import pytest

from mxtorq.config import (
    EvaluationPlan,
    Recipe,
    method_name,
    method_options,
    parse_method,
)
from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.transforms import METHODS
from mxtorq.transforms.base import SiteStatistics
from mxtorq.transforms.rotation import Identity
from mxtorq.transforms.torq.method import TORQ, InterAngle, Levels


@dataclass(frozen=True, kw_only=True)
class Mine:
    """A user's own method."""

    strength: float = 1.0
    careful: bool = False

    def fit(self, statistics: SiteStatistics, seed: int) -> Identity:
        return Identity(statistics.width)


@pytest.mark.parametrize("name", METHODS)
def test_names_go_there_and_back(name: str) -> None:
    method = parse_method(name)
    assert isinstance(method, METHODS[name])
    assert method_name(method) == name


def test_options() -> None:
    spec = "torq:levels=inter:angle=mean:s_step=floor:complementarity=0.5:blocks=100"
    method = parse_method(spec)
    assert method == TORQ(
        levels=Levels.INTER,
        angle=InterAngle.MEAN,
        s_step=ScaleRule.FLOOR,
        complementarity=0.5,
        blocks=100,
    )
    assert method_name(method) == spec
    options = method_options(method)
    assert options["levels"] == "inter"
    assert options["rounds"] == 10
    assert parse_method("torq:levels=both") == TORQ()


def test_a_user_s_own_method(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("my.methods")
    module.Mine = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my", types.ModuleType("my"))
    monkeypatch.setitem(sys.modules, "my.methods", module)
    method = parse_method("my.methods:Mine:strength=2.5:careful=true")
    assert method == Mine(strength=2.5, careful=True)
    with pytest.raises(UsageError, match="cannot be imported"):
        parse_method("my.methods:Yours")
    with pytest.raises(UsageError, match="cannot be imported"):
        parse_method("no.such.module:Mine")


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("torc", "did you mean 'torq'"),
        ("", "the method ''"),
        ("torq:level=inter", "did you mean 'levels='"),
        ("torq:levels", "did you mean 'levels='"),
        ("torq:levels=outer", "both, inter, intra"),
        ("torq:rounds=many", "expected: int"),
        ("identity:x=1", "identity"),
    ],
)
def test_wrong_methods_teach(spec: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        parse_method(spec)


@pytest.mark.parametrize(
    "wrong",
    [{"rounding": "gptk"}, {"calibration_tokens": 0}, {"seqlen": -1}, {"calibration_tokens": -5}],
)
def test_recipes_are_validated(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Recipe(method=TORQ(), **wrong)  # type: ignore[arg-type]


def test_plans_are_validated_and_both_are_frozen() -> None:
    with pytest.raises(UsageError):
        EvaluationPlan(eval_tokens=0)
    recipe = Recipe(method=TORQ())
    with pytest.raises(FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]
