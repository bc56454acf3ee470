"""Merged rotations keep the function, in float64, and leave out nothing that it takes."""

import pytest
import torch
from torch import nn

import oracles
import tiny_models
from mxtorq.calibration.capture import first_layer_inputs
from mxtorq.errors import ModelError
from mxtorq.models.family import SiteName
from mxtorq.surgery.fuse import transform_site_
from mxtorq.surgery.network import network
from mxtorq.surgery.offline import (
    apply_offline_,
    fold_norms_,
    rotate_heads_,
    rotate_residual_,
    round_kept_,
)
from mxtorq.transforms.base import OfflineRotations, Rotation, SiteStatistics, TransformMethod
from mxtorq.transforms.brq import BRQ
from mxtorq.transforms.kronecker import KroneckerRotation
from mxtorq.transforms.quarot import QuaRot, full_hadamard
from mxtorq.transforms.rotation import BlockRotation
from tiny_models import FAMILIES

HIDDEN = 64
HEAD_DIM = tiny_models.HEAD_DIM
WINDOWS = tiny_models.tokens(2, 32)
EPS = torch.finfo(torch.float64).eps


def orthogonal(size: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw)).Q


def signed_kronecker(width: int) -> KroneckerRotation:
    return full_hadamard(width, torch.Generator().manual_seed(4))


RESIDUAL: dict[str, Rotation] = {
    "dense": BlockRotation(HIDDEN, orthogonal(HIDDEN, 0)),
    "blocks": BlockRotation(HIDDEN, orthogonal(32, 1)),
    "kronecker": signed_kronecker(HIDDEN),
    "uneven factors": KroneckerRotation(
        torch.ones(HIDDEN, dtype=torch.float64), (orthogonal(4, 2), orthogonal(16, 3))
    ),
}


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=WINDOWS).logits


def assert_same_function(changed: nn.Module, name: str) -> None:
    """Each of the 14 linears, the embedding and the head is a product of at most 96 terms whose
    operands were themselves rotated (as many terms, on both sides): 4 d eps of the size of its
    result each; norms and the residual stream carry that on with a factor of order one a layer."""
    before, after = logits(tiny_models.build_fp64(name)), logits(changed)
    assert (after - before).abs().max() <= 4 * 96 * EPS * 16 * before.abs().max()


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("model.layers").children())


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_keeps_the_function_and_leaves_gains_of_one(name: str) -> None:
    model, family = tiny_models.build_fp64(name), FAMILIES[name]
    table = model.get_submodule(family.embedding).weight
    before = table.clone()
    fold_norms_(model, family)
    assert_same_function(model, name)
    norms = [module for path, module in model.named_modules() if path.endswith("norm")]
    stream = [norm for norm in norms if len(norm.weight) == HIDDEN]
    assert len(stream) == 5
    assert all((norm.weight == 1).all() for norm in stream)
    assert all((norm.weight != 1).any() for norm in norms if norm not in stream)  # q_norm, k_norm
    assert torch.equal(table, before)  # also where the head was tied to it
    assert model.get_submodule(family.head).weight is not table
    assert model.config.tie_word_embeddings is False
    model.tie_weights()  # what a loader does: nothing is tied any more
    assert_same_function(model, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_twice_is_folding_once(name: str) -> None:
    model = tiny_models.build(name)
    fold_norms_(model, FAMILIES[name])
    once = {key: value.clone() for key, value in model.state_dict().items()}
    fold_norms_(model, FAMILIES[name])
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rotation", RESIDUAL.values(), ids=RESIDUAL)
def test_a_rotated_stream_keeps_the_function(name: str, rotation: Rotation) -> None:
    model, family = tiny_models.build_fp64(name), FAMILIES[name]
    plain = first_layer_inputs(model, family, WINDOWS)[0].hidden
    fold_norms_(model, family)
    rotate_residual_(model, family, rotation)
    assert_same_function(model, name)
    turned = first_layer_inputs(model, family, WINDOWS)[0].hidden
    bound = 4 * HIDDEN * EPS * plain.norm(dim=-1).max()
    assert (turned - plain @ rotation.matrix()).abs().max() <= bound
    assert (turned - plain).abs().max() > 0.01  # it really is in other coordinates


@pytest.mark.parametrize("name", FAMILIES)
def test_rotated_heads_keep_the_function(name: str) -> None:
    model, family, size = tiny_models.build_fp64(name), FAMILIES[name], HEAD_DIM[name]
    for index, layer in enumerate(layers_of(model)):
        values = layer.get_submodule("self_attn.v_proj").weight
        before = values.clone()
        rotate_heads_(layer, family, BlockRotation(size, orthogonal(size, index)), size)
        head = slice(size, 2 * size)  # y' = y R, so W' = R^T W within each head
        expected = orthogonal(size, index).T @ before[head]
        assert (values[head] - expected).abs().max() <= 4 * size * EPS * before.norm()
    assert_same_function(model, name)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [16, 32])
def test_methods_keep_the_function_end_to_end(name: str, size: int) -> None:
    methods: list[TransformMethod] = [QuaRot()]
    if HEAD_DIM[name] % size == 0:
        methods.append(BRQ(size=size))
    for method in methods:
        model, family = tiny_models.build_fp64(name), FAMILIES[name]
        seen = network(model, family, WINDOWS)
        method.check(seen.shape)
        apply_offline_(model, family, method.rotations(seen, seed=5))
        kinds = set()
        for layer in layers_of(model):
            for site in family.sites:
                transform = method.fit(statistics(site.name, seen.shape.sites[site.name]), seed=5)
                kinds.add((site.name, transform.kind == "identity"))
                transform_site_(layer, site, transform)
        assert_same_function(model, name)
        assert kinds == {(at, at is not SiteName.DOWN_IN) for at in SiteName}


def statistics(name: SiteName, width: int) -> SiteStatistics:
    return oracles.site(torch.ones(1, width), torch.ones(2, width), name=name)


def test_without_folding_the_function_changes() -> None:
    """The control: gains hidden from the check, rotated, and put back."""
    model, family = tiny_models.build_fp64("llama"), FAMILIES["llama"]
    before = logits(model)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.input_layernorm") as caught:
        rotate_residual_(model, family, RESIDUAL["dense"])
    assert "fold_norms_" in caught.value.todo
    assert torch.equal(logits(model), before)
    norms = [module for path, module in model.named_modules() if path.endswith("norm")]
    gains = [norm.weight.clone() for norm in norms]
    for norm in norms:
        norm.weight.fill_(1.0)
    rotate_residual_(model, family, RESIDUAL["dense"])
    for norm, gain in zip(norms, gains, strict=True):
        norm.weight.copy_(gain)
    assert (logits(model) - before).abs().max() > 0.01 * before.abs().max()


@pytest.mark.parametrize("path", ["self_attn.o_proj", "mlp.down_proj", "self_attn.v_proj"])
def test_a_bias_left_behind_changes_the_function(path: str) -> None:
    model, family = tiny_models.build_fp64("llama"), FAMILIES["llama"]
    before = logits(model)
    bias = layers_of(model)[0].get_submodule(path).bias
    old = bias.clone()
    head = BlockRotation(16, orthogonal(16, 1))
    apply_offline_(model, family, OfflineRotations(RESIDUAL["dense"], (head, head)))
    assert_same_function(model, "llama")
    bias.copy_(old)
    assert (logits(model) - before).abs().max() > 0.001 * before.abs().max()


def test_centred_embeddings_would_change_the_function() -> None:
    """What a LayerNorm forgives and an RMSNorm does not."""
    model = tiny_models.build_fp64("llama")
    before = logits(model)
    table = model.get_submodule("model.embed_tokens").weight
    table.sub_(table.mean(-1, keepdim=True))
    assert (logits(model) - before).abs().max() > 0.001 * before.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_asked_for_is_not_touched(name: str) -> None:
    model, family, size = tiny_models.build(name), FAMILIES[name], HEAD_DIM[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    apply_offline_(model, family, OfflineRotations())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.tie_word_embeddings == tiny_models.CONFIGS[name].tie_word_embeddings
    head = BlockRotation(size, orthogonal(size, 0))
    apply_offline_(model, family, OfflineRotations(heads=(head, head)))
    changed = {k for k, value in model.state_dict().items() if not torch.equal(value, before[k])}
    assert all("v_proj" in key or "o_proj.weight" in key for key in changed)
    assert changed


class Shifted(nn.Module):
    """A norm with a gain of 1 + weight, as some families have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN, bias=False), Shifted(), nn.Identity()]
)
def test_norms_that_are_no_rms_norm_are_refused(norm: nn.Module) -> None:
    model, family = tiny_models.build("llama"), FAMILIES["llama"]
    model.set_submodule("model.layers.1.post_attention_layernorm", norm.requires_grad_(False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"model\.layers\.1\.post_attention_layernorm"):
        fold_norms_(model, family)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_rotations_of_other_sizes_are_refused() -> None:
    model, family = tiny_models.build("llama"), FAMILIES["llama"]
    fold_norms_(model, family)
    with pytest.raises(ModelError, match="128 features"):
        rotate_residual_(model, family, signed_kronecker(128))
    with pytest.raises(ModelError, match=r"self_attn\.v_proj with 32 outputs"):
        rotate_heads_(layers_of(model)[0], family, signed_kronecker(64), 64)
    with pytest.raises(ModelError, match="of heads of 32"):
        rotate_heads_(layers_of(model)[0], family, signed_kronecker(16), 32)
    with pytest.raises(ModelError, match="of heads of 16"):  # would mix the two heads of v_proj
        apply_offline_(model, family, OfflineRotations(heads=(signed_kronecker(32),) * 2))
    with pytest.raises(ModelError, match="2 layers"):
        apply_offline_(model, family, OfflineRotations(heads=(signed_kronecker(16),)))


def test_parameters_keep_their_dtype_and_are_rounded_once() -> None:
    """A BF16 model gets the float64 result rounded to BF16."""
    family, head = FAMILIES["llama"], BlockRotation(16, orthogonal(16, 0))
    model = tiny_models.build("llama").bfloat16()
    layer = layers_of(model)[0]
    before = layer.get_submodule("self_attn.o_proj").weight.double()
    rotate_heads_(layer, family, head, 16)
    exact = (before.unflatten(-1, (-1, 16)) @ head.rotation).flatten(-2)
    assert torch.equal(layer.get_submodule("self_attn.o_proj").weight, exact.bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_is_kept_is_rounded_to_bfloat16_and_the_rest_is_not() -> None:
    model, family = tiny_models.build("llama"), FAMILIES["llama"]
    paths = [path for site in family.sites for path in site.linears]
    linears = {family.linear_name(index, path) for index in (0, 1) for path in paths}
    linears.discard("model.layers.1.mlp.down_proj")  # one that stays in BF16
    before = {key: value.clone() for key, value in model.state_dict().items()}
    round_kept_(model, linears)
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        kept = before[key] if key.removesuffix(".weight") in linears else before[key].bfloat16()
        assert torch.equal(value, kept.float()), key
    assert not torch.equal(before["lm_head.weight"], model.state_dict()["lm_head.weight"])
