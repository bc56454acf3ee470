"""Experts with linears of their own compute what transformers' stacked ones do."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import tiny_models
from mxtorq.errors import ModelError
from mxtorq.models import FAMILIES
from mxtorq.surgery.experts import ExpertList, unpack_experts_

FAMILY = tiny_models.FAMILIES["qwen3_moe"]
IDS = tiny_models.tokens(4, 32)
EPS = torch.finfo(torch.float64).eps


def stacked(**changes: object) -> nn.Module:
    """As transformers builds it, in float64."""
    config = {**tiny_models.CONFIGS["qwen3_moe"].to_dict(), **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("normed", [True, False])
def test_logits_before_and_after_unpacking(implementation: str, normed: bool) -> None:
    model = stacked(norm_topk_prob=normed)
    model.config._experts_implementation = implementation
    before = model(input_ids=IDS).logits
    held = model.model.layers[1].mlp.experts.down_proj.untyped_storage().data_ptr()
    unpack_experts_(model, FAMILIES["qwen3_moe"])
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert isinstance(experts, ExpertList)
    assert experts.get_submodule("3.down_proj").weight.untyped_storage().data_ptr() == held
    after = model(input_ids=IDS).logits
    # Two layers of products of at most 96 terms, summed in another order.
    assert (after - before).abs().max() <= 4 * 96 * EPS * 2 * before.abs().max()
    # The same tensors under the names of checkpoints, and once is enough.
    names = {key for key in model.state_dict() if "layers.0.mlp" in key}
    parts = ("gate_proj", "up_proj", "down_proj")
    prefix = "model.layers.0.mlp"
    expected = {f"{prefix}.experts.{e}.{part}.weight" for e in range(4) for part in parts}
    assert names == {*expected, f"{prefix}.gate.weight"}
    unpack_experts_(model, FAMILIES["qwen3_moe"])
    assert model.get_submodule("model.layers.1.mlp.experts") is experts


def test_only_the_experts_that_are_chosen_are_called() -> None:
    model = tiny_models.build("qwen3_moe")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    called = []
    for number in range(4):
        experts.get_submodule(str(number)).register_forward_hook(
            lambda module, args, output, number=number: called.append((number, len(args[0])))
        )
    inputs = torch.randn(3, 64)
    chosen = torch.tensor([[2, 0], [2, 3], [0, 2]])
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    outputs = experts(inputs, chosen, weights)
    assert called == [(0, 2), (2, 3), (3, 1)]
    assert torch.equal(outputs[0], experts.get_submodule("2")(inputs, experts.act_fn)[0])


def test_what_a_list_tells_of_itself() -> None:
    """Who gets which tokens, and what reaches down_proj by the linears of an earlier time."""
    experts = tiny_models.build("qwen3_moe").get_submodule("model.layers.0.mlp.experts")
    chosen = torch.tensor([[2, 0], [2, 3], [0, 2]])
    found = [(e, tokens.tolist(), places.tolist()) for e, tokens, places in experts.routes(chosen)]
    assert found == [(0, [0, 2], [1, 0]), (2, [0, 1, 2], [0, 0, 1]), (3, [1], [1])]
    seen: list[torch.Tensor] = []
    down = experts.get_submodule("2.down_proj")
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = torch.randn(3, 64)
    experts(inputs, chosen, torch.ones(3, 2))
    inner = experts.inner(2)
    for part in ("gate", "up", "down"):
        experts.set_submodule(f"2.{part}_proj", nn.Identity())
    assert torch.equal(inner(inputs), seen[0])


def test_what_has_no_such_experts_is_refused() -> None:
    for changes in ({"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}):
        with pytest.raises(ModelError, match=r"layers\.\d\.mlp\.experts") as caught:
            unpack_experts_(stacked(**changes), FAMILIES["qwen3_moe"])
        assert "experts in every layer" in caught.value.todo
    model = stacked()
    held = model.get_submodule("model.layers.0.mlp.experts")
    held.down_proj = nn.Parameter(held.down_proj.mT.contiguous())
    with pytest.raises(ModelError, match="hidden, inner"):
        unpack_experts_(model, FAMILIES["qwen3_moe"])
    unpack_experts_(stacked(), FAMILIES["qwen3"])  # a family without experts: nothing to do


def test_a_family_gets_the_numbers_of_its_model() -> None:
    gate_up, down = FAMILY.sites[2:]
    assert gate_up.linears[:3] == (
        "mlp.experts.0.gate_proj",
        "mlp.experts.0.up_proj",
        "mlp.experts.1.gate_proj",
    )
    assert gate_up.groups[3] == ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj")
    assert (gate_up.taps, gate_up.passes) == (("mlp.experts",), 1)
    assert (down.taps, down.passes) == (down.linears, 2)
    assert down.sources == tuple(f"mlp.experts.{e}.up_proj" for e in range(4))
    assert len(FAMILY.residual_writers) == 5
    assert FAMILY.bound(tiny_models.CONFIGS["qwen3_moe"]) == FAMILY
    dense = FAMILIES["llama"]
    assert dense.bound(None) is dense
    assert dense.sites[0].groups == (dense.sites[0].linears,)
