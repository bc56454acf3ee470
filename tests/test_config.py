"""Recipes are validated at birth, and method names go to objects and back."""

from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path

import pytest

from mxtorq.config import (
    EvaluationPlan,
    Recipe,
    method_name,
    parse_method,
    parse_rounding,
    parse_scale,
    plan_from,
    read_settings,
    recipe_from,
    require_ocp,
    rounding_name,
    to_toml,
    with_budget,
)
from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.scales import NonOCPScale
from mxtorq.rounding import ROUNDINGS
from mxtorq.rounding.gptq import GPTQ, Order
from mxtorq.specs import options_of
from mxtorq.transforms import METHODS
from mxtorq.transforms.base import SiteStatistics, TransformMethod
from mxtorq.transforms.mxtorq.method import MXTORQ
from mxtorq.transforms.rotation import Identity
from mxtorq.transforms.torq.method import TORQ, InterAngle, Levels

CORRECTED = "gptq:exponents=3:search=outputs:sweeps=2:inputs=corrected"


@dataclass(frozen=True, kw_only=True)
class Mine(TransformMethod):
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
    options = options_of(method)
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
    for wrong in (
        "collections.abc:Mapping",
        "mxtorq.transforms.base:TransformMethod",
        "os.path:sep",
    ):
        with pytest.raises(UsageError, match="TransformMethod"):
            parse_method(wrong)
    for wrong in (".relative:Mine", "mxtorq.:Mine", "a..b:Mine", "a.b\0:Mine"):
        with pytest.raises(UsageError, match="cannot be imported"):
            parse_method(wrong)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("torc", "did you mean 'torq'"),
        ("", "the method ''"),
        ("torq:level=inter", "did you mean 'levels'"),
        ("torq:levels", "did you mean 'levels='"),
        ("torq:levels=outer", "both, inter, intra"),
        ("torq:rounds=many", "expected: int"),
        ("identity:x=1", "identity"),
    ],
)
def test_wrong_methods_teach(spec: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        parse_method(spec)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_roundings_go_there_and_back(name: str) -> None:
    assert rounding_name(parse_rounding(name)) == name
    backward = parse_rounding("gptq:order=backward:damping=0.1")
    assert backward == GPTQ(order=Order.BACKWARD, damping=0.1)
    assert set(rounding_name(backward).split(":")) == {"gptq", "order=backward", "damping=0.1"}
    with pytest.raises(UsageError, match="did you mean 'gptq'"):
        parse_rounding("gptk")


def test_scales_by_name() -> None:
    assert parse_scale("even") is ScaleRule.EVEN
    assert parse_scale("log256") is NonOCPScale.LOG256
    with pytest.raises(UsageError, match="did you mean 'rceil'"):
        parse_scale("rcei")


@pytest.mark.parametrize(
    "wrong", [{"calibration_tokens": 0}, {"seqlen": -1}, {"calibration_tokens": -5}]
)
def test_recipes_are_validated(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Recipe(method=TORQ(), **wrong)


def test_a_method_that_counts_on_gptq_is_refused_without_it() -> None:
    conditional = parse_method("wush:curvature=conditional")
    with pytest.raises(UsageError, match="rounding gptq"):
        Recipe(method=conditional)
    assert Recipe(method=conditional, rounding=GPTQ()).rounding == GPTQ()
    with pytest.raises(UsageError, match="exponents"):
        Recipe(
            method=TORQ(), rounding=parse_rounding("rtn:exponents=3"), scale_rule=NonOCPScale.LOG256
        )


def test_what_no_hardware_has_is_not_written() -> None:
    require_ocp(ScaleRule.FLOOR)
    for scale in NonOCPScale:
        with pytest.raises(UsageError, match="mxtorq compare"):
            require_ocp(scale)


def test_toml_goes_there_and_back(tmp_path: Path) -> None:
    recipe = Recipe(
        method=TORQ(levels=Levels.INTER, complementarity=0.5, tolerance=1e-7),
        rounding=GPTQ(order=Order.BACKWARD),
        scale_rule=ScaleRule.EVEN,
        calibration='a "quoted" \\ name.txt',
        seqlen=512,
        seed=3,
        outliers="qwen3-0.6b",
        allow_unfit=True,
    )
    plan = EvaluationPlan(text="wikitext2", seqlen=512)
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe, plan))
    settings, evaluation = read_settings(path)
    assert recipe_from(settings) == recipe
    assert plan_from(evaluation) == plan
    path.write_text('method = "torq:levels=inter"\nrounding = "gptq"\n')
    settings, evaluation = read_settings(path)
    assert recipe_from(settings) == Recipe(method=TORQ(levels=Levels.INTER), rounding=GPTQ())
    assert evaluation == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('metod = "torq"', "did you mean 'method'"),
        ('rounding = "rtn"', "which method"),
        ('method = "torq"\nseed = "1"', "type str"),
        ('method = "torq"\nseed = true', "type bool"),
        ('method = "torq"\nallow_unfit = 1', "type int"),
        ('method = "torq"\nscale_rule = "flor"', "did you mean 'floor'"),
        ('[method]\nname = "torq"\nlevel = "inter"', "did you mean 'levels'"),
        ('[method]\nname = "torq"\nrounds = 2.5', "expected: int"),
        ('[method]\nname = "torq"\nrounds = true', "expected: int"),
        ("method = ", "TOMLDecodeError"),
        ('method = "torq"\nevaluation = 5', "is a table"),
        ("method = " + "[" * 9000, "RecursionError"),
        ("seed = " + "9" * 5000, "4300 digits"),
        ("#" * 2**17, "values take far more"),
        ('method = "torq"\nseed = -1', "number outside"),
        ('method = "torq"\nseed = 9223372036854775808', "number outside"),
    ],
)
def test_wrong_files_teach(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        recipe_from(read_settings(path)[0])
    with pytest.raises(UsageError, match="recipes/"):
        read_settings(tmp_path / "none.toml")


def test_a_number_that_is_no_float_teaches() -> None:
    with pytest.raises(UsageError, match="expected: float"):
        recipe_from({"method": {"name": "torq", "complementarity": 10**400}})


def test_a_recipe_without_a_rounding_gets_the_method_s_usual_one() -> None:
    """One that names a rounding keeps it, and so does a `Recipe` that is written as an object."""
    for name, factory in METHODS.items():
        found = recipe_from({"method": name}).rounding
        assert found == parse_rounding(CORRECTED if name == "mxtorq" else "rtn")
        assert found == parse_rounding(factory.usual_rounding)
        named = recipe_from({"method": name, "rounding": "gptq:order=backward"})
        assert named.rounding == GPTQ(order=Order.BACKWARD)
    assert Recipe(method=MXTORQ()).rounding == parse_rounding("rtn")


def test_a_budget_belongs_to_a_method_that_has_one() -> None:
    recipe = recipe_from({"method": "mxtorq:margin=0.05:budget=64", "seed": 3})
    assert with_budget(recipe, None) == recipe
    changed = with_budget(recipe, 32)
    assert changed.method == MXTORQ(margin=0.05, budget=32)
    assert replace(changed, method=recipe.method) == recipe
    for name in METHODS:
        if name != "mxtorq":
            with pytest.raises(UsageError, match="choose the method mxtorq"):
                with_budget(recipe_from({"method": name}), 32)
    with pytest.raises(UsageError, match="budget=-1"):
        with_budget(recipe, -1)


def test_unknown_keys_of_a_plan_teach() -> None:
    with pytest.raises(UsageError, match="did you mean 'seqlen'"):
        plan_from({"seqlne": 5})


RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_we_ship_are_valid(path: Path) -> None:
    settings, evaluation = read_settings(path)
    recipe = recipe_from(settings)
    plan_from(evaluation)
    assert recipe_from(recipe.to_dict()) == recipe
    assert path.read_text().startswith("#"), "a recipe says what it is"


def test_there_is_a_recipe_for_every_method() -> None:
    named = {type(recipe_from(read_settings(path)[0]).method) for path in RECIPES}
    assert named == set(METHODS.values())


def test_plans_are_validated_and_both_are_frozen() -> None:
    with pytest.raises(UsageError):
        EvaluationPlan(eval_tokens=0)
    recipe = Recipe(method=TORQ())
    with pytest.raises(FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]
