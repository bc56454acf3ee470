"""An engine's linear is `MXFP4Linear`, alone and as the sum of its ranks."""

import pytest
import torch

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, dequantize, quantize
from mxtorq.serving.vllm.product import RankInput, multiply, rank_input
from mxtorq.surgery.linear import MXFP4Linear
from mxtorq.transforms.base import Transform
from mxtorq.transforms.rotation import BlockRotation, Identity
from mxtorq.transforms.torq.inter_block import GivensChain
from mxtorq.transforms.torq.rotation import TwoLevelRotation

WIDTH, ROWS = 128, 48
CPU = torch.device("cpu")


def rotation() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=draw)).Q


def torq() -> TwoLevelRotation:
    planes = torch.tensor([0, 1]), torch.tensor([3, 2])
    turn = torch.full((2,), 0.8, dtype=torch.float64), torch.full((2,), 0.6, dtype=torch.float64)
    return TwoLevelRotation(WIDTH, GivensChain(*planes, *turn), rotation())


TRANSFORMS: dict[str, Transform] = {
    "identity": Identity(WIDTH),
    "block rotation": BlockRotation(WIDTH, rotation()),
    "torq": torq(),
}


def weight() -> MXFP4:
    return quantize(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)))


def inputs(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_is_the_linear_of_a_loaded_checkpoint(name: str, tokens: int) -> None:
    bias = torch.arange(ROWS).float()
    linear = MXFP4Linear(weight(), bias, TRANSFORMS[name], ScaleRule.EVEN)
    site = rank_input(TRANSFORMS[name], ScaleRule.EVEN, CPU)
    found = multiply(site, inputs(tokens), weight(), bias)
    assert torch.equal(found, linear(inputs(tokens)))


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    site, few = rank_input(torq(), ScaleRule.FLOOR, CPU), inputs(8).bfloat16()
    found = multiply(site, few, weight(), None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, multiply(site, few.float(), weight(), None).bfloat16())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_ranks_add_up(name: str) -> None:
    values, codes = inputs(40), weight()
    whole = rank_input(TRANSFORMS[name], ScaleRule.FLOOR, CPU)
    rounded = whole(values)
    total = torch.zeros(40, ROWS)
    for rank in range(2):
        mine = slice(64 * rank, 64 * rank + 64)
        gathered: list[torch.Tensor] = []

        def gather(part: torch.Tensor, log: list[torch.Tensor] = gathered) -> torch.Tensor:
            log.append(part)
            return values

        site: RankInput = rank_input(TRANSFORMS[name], ScaleRule.FLOOR, CPU, mine, gather)
        part = values[:, mine]
        assert torch.equal(site(part), rounded[:, mine])
        assert len(gathered) == (name == "torq")
        packed, e8m0 = codes.packed.chunk(2, 1)[rank], codes.e8m0.chunk(2, 1)[rank]
        total += multiply(site, part, MXFP4(packed.contiguous(), e8m0.contiguous()), None)
    expected = multiply(whole, values, codes, None)
    magnitudes = rounded.abs() @ dequantize(codes).abs().T
    bound = (WIDTH + 1) * torch.finfo(torch.float32).eps * magnitudes
    assert ((total - expected).abs() <= bound).all()


def test_a_rank_rounds_nothing_else_than_its_channels() -> None:
    """The control: without the gathered channels TORQ's codes are others."""
    mine = slice(0, 64)
    site = rank_input(torq(), ScaleRule.FLOOR, CPU, mine, lambda part: part.repeat(1, 2))
    right = rank_input(torq(), ScaleRule.FLOOR, CPU)(inputs(40))[:, mine]
    assert not torch.equal(site(inputs(40)[:, mine]), right)
