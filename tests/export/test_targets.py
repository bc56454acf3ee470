"""What a target can run, and what it is refused."""

import pytest
import torch

from mxtorq.config import Recipe, parse_method, parse_scale, parse_target, recipe_from
from mxtorq.errors import UsageError
from mxtorq.export.targets import Target, carried
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.transforms.base import Transform
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.chain import Chain
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.engine_matrix import EngineMatrix
from mxtorq.transforms.rotation import BlockRotation, Identity
from mxtorq.transforms.torq.inter_block import EMPTY_CHAIN, GivensChain
from mxtorq.transforms.torq.rotation import TwoLevelRotation

WIDTH = 96
VLLM = (Target.VLLM_BLACKWELL, Target.VLLM_EMULATION, Target.ROCM)


def orthogonal(size: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(size)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw)).Q


ONE = torch.ones(1, dtype=torch.float64)
PAIR = GivensChain(torch.tensor([0]), torch.tensor([2]), 0.6 * ONE, 0.8 * ONE)
SHARED: dict[str, Transform] = {
    "rotation": BlockRotation(WIDTH, orthogonal(32)),
    "torq within blocks": TwoLevelRotation(WIDTH, EMPTY_CHAIN, orthogonal(32)),
}
OTHERS: dict[str, Transform] = {
    "other size": BlockRotation(WIDTH, orthogonal(48)),
    "torq": TwoLevelRotation(WIDTH, PAIR, orthogonal(32)),
    "torq between blocks": TwoLevelRotation(WIDTH, PAIR, None),
    "a matrix a block": BlockMatrices(torch.stack([orthogonal(32)] * 3)),
    "smoothing left over": Chain(
        (Diagonal(torch.full((WIDTH,), 2.0).double()), BlockRotation(WIDTH, orthogonal(32)))
    ),
}


@pytest.mark.parametrize("target", VLLM)
@pytest.mark.parametrize("name", SHARED)
def test_vllm_gets_the_matrix_that_it_will_apply(target: Target, name: str) -> None:
    made = carried(SHARED[name], target, "site", plain=True)
    assert isinstance(made, EngineMatrix)
    assert made.width == WIDTH
    # BF16 twice: 2^-8 of each entry, itself at most 1.
    assert (made.block - orthogonal(32)).abs().max() <= 2.0**-8
    with pytest.raises(UsageError, match="with a bias or of experts"):
        carried(SHARED[name], target, "site", plain=False)


@pytest.mark.parametrize("target", [*VLLM, Target.TRANSFORMERS])
@pytest.mark.parametrize("name", OTHERS)
def test_what_an_engine_would_drop_is_refused(target: Target, name: str) -> None:
    with pytest.raises(UsageError, match="has to run online"):
        carried(OTHERS[name], target, "site", plain=True)


def test_transformers_runs_none() -> None:
    for transform in SHARED.values():
        with pytest.raises(UsageError, match="drops transform_config in silence"):
            carried(transform, Target.TRANSFORMERS, "site", plain=True)


@pytest.mark.parametrize("target", Target)
def test_no_transform_is_no_trouble(target: Target) -> None:
    identity = Identity(WIDTH)
    assert carried(identity, target, "site", plain=False) is identity


def test_our_own_adapters_run_everything() -> None:
    for transform in (*SHARED.values(), *OTHERS.values()):
        assert carried(transform, Target.MXTORQ, "site", plain=False) is transform


def test_targets_decide_the_rule_of_activations() -> None:
    rules = {target: target.card.activations for target in Target}
    assert rules == {
        Target.MXTORQ: None,
        Target.VLLM_BLACKWELL: ScaleRule.RCEIL,
        Target.VLLM_EMULATION: ScaleRule.EVEN,
        Target.ROCM: ScaleRule.EVEN,
        Target.TRANSFORMERS: ScaleRule.EVEN,
    }
    recipe = recipe_from({"method": "identity", "target": "vllm-blackwell", "scale_rule": "even"})
    assert (recipe.scale_rule, recipe.activation_rule) == (ScaleRule.EVEN, ScaleRule.RCEIL)
    assert recipe_from({"method": "identity"}).activation_rule is ScaleRule.FLOOR
    assert recipe.to_dict()["target"] == "vllm-blackwell"


def test_unknown_and_impossible_targets() -> None:
    with pytest.raises(UsageError, match="vllm-blackwell"):
        parse_target("vllm-blackwel")
    method = parse_method("identity")
    with pytest.raises(UsageError, match="both outside of the format"):
        Recipe(method=method, scale_rule=parse_scale("log256"), target=Target.ROCM)
    assert Recipe(method=method, scale_rule=parse_scale("log256")).activation_rule.value == "log256"
