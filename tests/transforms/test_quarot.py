"""QuaRot and BRQ: which rotations they choose. That they keep the function: tests/surgery."""

import math

import pytest
import torch

import oracles
from mxtorq.errors import UsageError
from mxtorq.models.family import SiteName
from mxtorq.transforms import METHODS
from mxtorq.transforms.base import Network, NetworkShape, SiteStatistics, TransformMethod
from mxtorq.transforms.brq import BRQ
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.quarot import QuaRot

METHOD_OBJECTS: list[TransformMethod] = [QuaRot(), BRQ(), BRQ(size=16)]


def shape(hidden: int = 96, head_dim: int = 32, down: int = 160) -> NetworkShape:
    widths = dict.fromkeys(SiteName, hidden) | {SiteName.DOWN_IN: down}
    return NetworkShape(hidden, 3, 3, head_dim, 2, widths)


def network(**sizes: int) -> Network:
    """Data-free methods ask for no loss."""

    def unused(*_: object) -> torch.Tensor:
        raise AssertionError

    return Network(shape=shape(**sizes), windows=0, loss=unused)


def statistics(name: SiteName, width: int) -> SiteStatistics:
    return oracles.site(torch.ones(1, width), torch.ones(1, width), name=name)


def test_they_are_in_the_table() -> None:
    assert METHODS["quarot"] is QuaRot
    assert METHODS["brq"] is BRQ


def test_quarot_spreads_every_channel_over_all_others() -> None:
    rotations = QuaRot().rotations(network(), seed=1)
    for rotation, width in ((rotations.residual, 96), (rotations.heads[1], 32)):
        even = torch.full((width, width), 1 / math.sqrt(width), dtype=torch.float64)
        assert torch.allclose(rotation.matrix().abs(), even, rtol=1e-14)
    assert len(rotations.heads) == 2
    # The stream has random signs, heads and the online rotation have none.
    assert {*rotations.residual.signs.tolist()} == {1.0, -1.0}
    assert (rotations.heads[0].signs == 1).all()
    online = QuaRot().fit(statistics(SiteName.DOWN_IN, 160), seed=1)
    assert (online.signs == 1).all()
    assert (online.matrix().abs() - 1 / math.sqrt(160)).abs().max() < 1e-15


@pytest.mark.parametrize("size", [16, 32])
def test_brq_repeats_one_signed_block(size: int) -> None:
    rotations = BRQ(size=size).rotations(network(), seed=1)
    dense = rotations.residual.matrix()
    block = dense[:size, :size]
    assert torch.equal(dense, torch.block_diag(*[block] * (96 // size)))
    signs = block[:, :1] * math.sqrt(size)
    assert {*signs.round().flatten().tolist()} == {1.0, -1.0}
    assert torch.allclose(block, signs * sylvester(size), atol=1e-15)
    heads = torch.block_diag(*[sylvester(size)] * (32 // size))
    assert all(torch.equal(head.matrix(), heads) for head in rotations.heads)
    online = BRQ(size=size).fit(statistics(SiteName.DOWN_IN, 160), seed=1).matrix()
    assert torch.equal(online, torch.block_diag(*[sylvester(size)] * (160 // size)))


def test_an_outlier_leaves_its_block_with_quarot_and_stays_with_brq() -> None:
    outlier = torch.zeros(1, 96, dtype=torch.float64)
    outlier[0, 40] = 1.0
    everywhere = QuaRot().rotations(network(), seed=0).residual.apply(outlier)
    inside = BRQ().rotations(network(), seed=0).residual.apply(outlier)
    assert (everywhere != 0).all()
    assert inside.nonzero()[:, 1].tolist() == list(range(32, 64))


@pytest.mark.parametrize("method", METHOD_OBJECTS)
def test_only_the_input_of_down_proj_is_rotated_online(method: TransformMethod) -> None:
    kinds = {name: method.fit(statistics(name, 160), seed=0).kind for name in SiteName}
    assert [name for name, kind in kinds.items() if kind != "identity"] == [SiteName.DOWN_IN]


@pytest.mark.parametrize("method", METHOD_OBJECTS)
def test_the_seed_decides(method: TransformMethod) -> None:
    first, again, other = (
        method.rotations(network(), seed).residual.matrix() for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_has_no_hadamard_is_refused_before_any_work() -> None:
    QuaRot().check(shape(down=14336))
    for sizes in ({"down": 11008}, {"head_dim": 33}, {"hidden": 98}):
        with pytest.raises(UsageError, match="Hadamard matrix of size") as caught:
            QuaRot().check(shape(**sizes))
        assert "`brq`" in caught.value.todo


def test_blocks_that_do_not_fit_name_a_size_that_does() -> None:
    BRQ().check(shape(down=11008))
    with pytest.raises(UsageError, match="48 features") as caught:
        BRQ().check(shape(head_dim=48))
    assert "a head has 48" in caught.value.found
    assert caught.value.todo == "choose size=16"
    BRQ(size=16).check(shape(head_dim=48))
    with pytest.raises(UsageError, match="residual stream"):
        BRQ(size=64).check(shape(hidden=96))
    with pytest.raises(UsageError, match="down_proj"):
        BRQ().check(shape(down=80))
    with pytest.raises(UsageError, match="size=24"):
        BRQ(size=24)
