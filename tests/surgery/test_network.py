"""The loss that methods see, against a network that really is rotated and rounded."""

from typing import Any

import pytest
import torch
from torch import nn

import tiny_models
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import fake_quantize
from mxtorq.models.family import SiteName
from mxtorq.surgery import network as module
from mxtorq.surgery.linear import linear_at
from mxtorq.surgery.network import network, network_shape
from mxtorq.surgery.offline import apply_offline_
from mxtorq.transforms.base import OfflineRotations, Transform
from mxtorq.transforms.quarot import full_hadamard
from mxtorq.transforms.rotation import BlockRotation, Identity
from mxtorq.transforms.torq.inter_block import equalize
from mxtorq.transforms.torq.rotation import TwoLevelRotation
from tiny_models import FAMILIES

HIDDEN = 64
HEAD_DIM = tiny_models.HEAD_DIM
WINDOWS = tiny_models.tokens(4, 24)
EPS = torch.finfo(torch.float64).eps
BOUND = 4 * 96 * EPS * 16
"""Relative: 16 linears, embedding and head, each a product of at most 96 terms, rotated twice."""


def orthogonal(size: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw)).Q


def matrices(name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return orthogonal(HIDDEN, 0), [orthogonal(HEAD_DIM[name], seed) for seed in (1, 2)]


def nll(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Token by token."""
    log_probabilities = model(input_ids=windows).logits.log_softmax(-1)
    terms = [
        -log_probabilities[w, at, windows[w, at + 1]]
        for w in range(len(windows))
        for at in range(windows.shape[1] - 1)
    ]
    return torch.stack(terms).mean()


class Rounded(nn.Module):
    """A linear whose transformed input is rounded: the definition."""

    def __init__(self, linear: nn.Linear, transform: Transform) -> None:
        super().__init__()
        self.transform = transform
        self.weight, self.bias = transform.fuse(linear.weight), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = fake_quantize(self.transform.apply(x).float(), ScaleRule.FLOOR).double()
        return nn.functional.linear(rounded, self.weight, self.bias)


def spread() -> TwoLevelRotation:
    """A rotation of 64 features that is not symmetric."""
    moment = torch.tensor([[9.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    return TwoLevelRotation(HIDDEN, equalize(moment), orthogonal(32, 5))


ONLINE: dict[str, dict[SiteName, Transform]] = {
    "none": {},
    "down": {SiteName.DOWN_IN: full_hadamard(96), SiteName.QKV_IN: Identity(HIDDEN)},
    "after R1": {SiteName.QKV_IN: spread(), SiteName.DOWN_IN: full_hadamard(96)},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("online", ONLINE.values(), ids=ONLINE)
def test_it_is_the_loss_of_the_merged_and_rounded_model(
    name: str, online: dict[SiteName, Transform]
) -> None:
    """Rotated inputs agree to float64 precision, so they round to the same MXFP4 values unless one
    lies that close to a cut, which these do not."""
    family, (residual, heads) = FAMILIES[name], matrices(name)
    model = tiny_models.build_fp64(name)
    found = network(model, family, WINDOWS).loss(residual, heads, online, [0, 3])
    merged = tiny_models.build_fp64(name)
    size = HEAD_DIM[name]
    rotations = OfflineRotations(
        BlockRotation(HIDDEN, residual), tuple(BlockRotation(size, head) for head in heads)
    )
    apply_offline_(merged, family, rotations)
    for layer in merged.get_submodule(family.layers).children():
        for site in family.sites:
            for path in site.linears:
                linear = linear_at(layer, path)
                transform = online.get(site.name, Identity(linear.in_features))
                layer.set_submodule(path, Rounded(linear, transform))
    expected = nll(merged, WINDOWS[[0, 3]])
    assert (found - expected).abs() <= BOUND * expected
    # The rounding counts, and so do the rotations:
    eye = torch.eye(HIDDEN, dtype=torch.float64)
    assert (found - nll(model, WINDOWS[[0, 3]])).abs() > 1e-4
    assert (found - network(model, family, WINDOWS).loss(eye, heads, online, [0, 3])).abs() > 1e-4
    assert (found - network(model, family, WINDOWS).loss(residual, [], online, [0, 3])).abs() > 1e-6


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("online", ONLINE.values(), ids=ONLINE)
def test_without_rounding_it_is_the_plain_loss(
    name: str, online: dict[SiteName, Transform], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_nearest", lambda values: values)
    family, (residual, heads) = FAMILIES[name], matrices(name)
    model = tiny_models.build_fp64(name)
    seen = network(model, family, WINDOWS)
    plain = nll(model, WINDOWS)
    everything = list(range(4))
    for r1, r2 in ((residual, heads), (torch.eye(HIDDEN, dtype=torch.float64), [])):
        assert (seen.loss(r1, r2, online, everything) - plain).abs() <= BOUND * plain


class Frozen:
    """Rounding errors of the first pass, added as constants in later ones: the function whose
    derivative the straight-through gradient is."""

    def __init__(self) -> None:
        self.errors: list[torch.Tensor] = []
        self.at: int | None = None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        if self.at is None:
            rounded = fake_quantize(values.float(), ScaleRule.FLOOR).to(values.dtype)
            self.errors.append((rounded - values).detach())
            return rounded
        self.at += 1
        return values + self.errors[self.at - 1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("online", ONLINE.values(), ids=ONLINE)
def test_gradients_are_those_of_the_rounding_frozen(
    name: str, online: dict[SiteName, Transform], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Central differences of step h have the error h^2 |f'''| / 6 + eps |f| / h: at h = 1e-5 both
    are about 1e-10 for derivatives of order one; they are 1e-2 to 1 here."""
    frozen = Frozen()
    monkeypatch.setattr(module, "_nearest", frozen)
    residual, heads = matrices(name)
    points = [residual.requires_grad_(), *(head.requires_grad_() for head in heads)]
    seen = network(tiny_models.build_fp64(name), FAMILIES[name], WINDOWS)
    seen.loss(points[0], points[1:], online, [1]).backward()
    draw = torch.Generator().manual_seed(9)
    for index, point in enumerate(points):
        direction = torch.randn(point.shape, dtype=torch.float64, generator=draw)
        values = []
        for h in (1e-5, -1e-5):
            moved = [p.detach() for p in points]
            moved[index] = moved[index] + h * direction
            frozen.at = 0
            values.append(seen.loss(moved[0], moved[1:], online, [1]))
            assert frozen.at == len(frozen.errors)
        slope = ((values[0] - values[1]) / 2e-5).item()
        assert slope == pytest.approx((point.grad * direction).sum().item(), rel=1e-5, abs=1e-8)
        assert abs(slope) > 1e-4


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_frozen_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, family = tiny_models.build("qwen3"), FAMILIES["qwen3"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    installed = hooks(model)
    residual, heads = matrices("qwen3")
    residual.requires_grad_()
    seen = network(model, family, WINDOWS)
    loss = seen.loss(residual, heads, {SiteName.DOWN_IN: full_hadamard(96)}, [0])
    loss.backward()
    assert loss.dtype == torch.float32
    assert residual.grad is not None
    assert residual.grad.dtype == torch.float64
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks(model) == installed

    def broken(values: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "_nearest", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        seen.loss(residual, heads, {}, [0])
    assert hooks(model) == installed
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_is_rounding_to_the_bit(dtype: torch.dtype) -> None:
    """x + (round(x) - x) is round(x): the difference is exact."""
    values = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0] = torch.linspace(-7.9, 7.9, 64).to(dtype)
    values.requires_grad_()
    rounded = module._straight_through(values)
    assert torch.equal(rounded, fake_quantize(values.detach(), ScaleRule.FLOOR))
    rounded.sum().backward()
    assert (values.grad == 1).all()


def test_a_bfloat16_model_has_a_float32_loss() -> None:
    residual, heads = matrices("llama")
    seen = network(tiny_models.build("llama").bfloat16(), FAMILIES["llama"], WINDOWS)
    loss = seen.loss(residual, heads, {SiteName.DOWN_IN: full_hadamard(96)}, [0, 1])
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_the_shape_of_a_network() -> None:
    llama = network_shape(tiny_models.build("llama", intermediate_size=172), FAMILIES["llama"])
    assert (llama.hidden, llama.heads, llama.kv_heads, llama.head_dim, llama.layers) == (
        64, 4, 2, 16, 2,
    )  # fmt: skip
    assert llama.sites == {"qkv_in": 64, "o_in": 64, "gate_up_in": 64}  # 172 stays unquantized
    qwen = network_shape(tiny_models.build("qwen3"), FAMILIES["qwen3"])
    assert qwen.head_dim == 32
    assert qwen.sites == {"qkv_in": 64, "o_in": 128, "gate_up_in": 64, "down_in": 96}


def test_windows_are_counted() -> None:
    assert network(tiny_models.build("llama"), FAMILIES["llama"], WINDOWS).windows == 4
