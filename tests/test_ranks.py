"""What ranks say to each other, in two processes that torchrun starts; this file is their program.

Each of them checks what it got against what both of them know.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxtorq.calibration import statistics
from mxtorq.calibration.capture import (
    capture_hessians,
    capture_sites,
    capture_split,
    each_first_input,
)
from mxtorq.calibration.experts import capture_experts
from mxtorq.calibration.gradients import capture_gradients
from mxtorq.choosing import hold_out
from mxtorq.errors import RankError
from mxtorq.ranks import SOLO, Ranks, ranks_from_environment, shares
from mxtorq.sharing import all_transforms
from mxtorq.transforms import KINDS
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.hadamard import Hadamard

CPU = torch.device("cpu")


def test_one_process_gets_back_what_it_gave() -> None:
    values = torch.tensor([1.0, -0.0])
    assert SOLO.leads
    assert SOLO.sum_(values) is values
    assert SOLO.max_(values) is values
    assert SOLO.gather([values])[0] is values
    assert SOLO.all_tensors({"a": values})["a"] is values
    assert SOLO.all_json({"a": 1}) == [{"a": 1}]
    assert SOLO.json_from_leader(3) == 3
    SOLO.wait()
    with ranks_from_environment(CPU) as ranks:
        assert (ranks.rank, ranks.size, ranks.device) == (0, 1, CPU)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_work_is_shared_evenly(size: int) -> None:
    """No rank has more than a fair part and the largest piece (the bound of greedy schedules)."""
    costs = [7, 1, 9, 9, 3, 2, 8, 4, 6, 5, 0, 9]
    owners = shares(costs, size)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / size + max(costs)
    assert min(loads) >= max(loads) - max(costs)
    assert owners == shares(costs, size)
    assert shares([], size) == []


def test_what_ranks_say_and_sum_up() -> None:
    """The functions below, on two ranks."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all is well") == 2, done.stdout + done.stderr


def everything_arrives(ranks: Ranks) -> None:
    me = ranks.rank
    assert ranks.all_json({"é": me}) == [{"é": 0}, {"é": 1}]
    assert ranks.all_json("x" * me * 1000) == ["", "x" * 1000]
    assert ranks.json_from_leader([me, 1.1]) == [0, 1.1]
    assert ranks.sum_(torch.full((3, 2), me + 0.5, dtype=torch.float64)).tolist() == [[2.0] * 2] * 3
    assert ranks.sum_(torch.empty(0, 0)).shape == (0, 0)
    assert ranks.max_(torch.tensor([me, -me]).float()).tolist() == [1.0, 0.0]
    zero = torch.tensor([-0.0])
    parts = [torch.arange(5 - me)[:, None], zero, torch.ones(0, 3), torch.tensor(me)]
    parts = [*parts, torch.tensor([0.1], dtype=torch.bfloat16), torch.ones(3, dtype=torch.uint8)]
    found = ranks.gather(parts if me == 0 else parts[:2])
    assert [tuple(part.shape) for part in found[:6]] == [(5, 1), (1,), (0, 3), (), (1,), (3,)]
    assert found[4].dtype == torch.bfloat16
    assert found[4].item() == parts[4].item()
    assert [tuple(part.shape) for part in found[6:]] == [(4, 1), (1,)]
    assert bool(found[7].signbit())
    assert ranks.gather([]) == []
    assert list(ranks.all_tensors({f"of {me}": zero})) == ["of 0", "of 1"]
    with ranks.leader_first():
        ranks_seen.append(me)


ranks_seen: list[int] = []


def transforms_arrive(ranks: Ranks) -> None:
    """By their tensors, and those of the caller's own by being chosen again."""

    class Own(Diagonal):
        kind = "own"

    assert Own.kind not in KINDS
    known = Diagonal(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    mine = [{"a": known}, {"b": Hadamard().fit(_seen(64), 0), "own": Own(known.factors)}]
    asked: list[str] = []

    def again(name: str) -> Diagonal:
        asked.append(name)
        return Own(known.factors)

    found = all_transforms(ranks, mine[ranks.rank], again)
    assert asked == [["own"], []][ranks.rank]
    assert [each.kind for each in found.values()] == ["diagonal", "block-rotation", "own"]
    assert torch.equal(found["a"].matrix(), known.matrix())
    assert torch.equal(found["b"].matrix(), Hadamard().fit(_seen(64), 0).matrix())


def _seen(width: int) -> statistics.SiteStatistics:
    nothing = torch.zeros(0, width)
    return statistics.SiteStatistics(
        site="s",
        name=statistics.SiteName.O_IN,
        tokens=0,
        second_moment=None,
        amax=torch.zeros(width),
        sample=nothing,
        weights=(nothing,),
    )


def sums_are_those_of_one_process(ranks: Ranks, family_name: str, windows: int) -> None:
    """To the bit with ``exact``, and otherwise but for the order of float64 sums."""
    import tiny_models

    family, model = tiny_models.FAMILIES[family_name], tiny_models.build(family_name)
    layer = model.get_submodule(f"{family.layers}.0")
    sites = {family.site_name(0, site): site for site in family.sites}
    ids = tiny_models.tokens(windows, 32)  # two windows a batch, 16 sampled tokens
    whole = list(each_first_input(model, family, ids))
    mine = list(each_first_input(model, family, ids, ranks=ranks))
    assert len(mine) == len(range(ranks.rank, len(whole), 2))
    expected = capture_sites(layer, sites, whole, seed=1)
    found = capture_sites(layer, sites, mine, seed=1, ranks=ranks)
    through = dict.fromkeys(sites, torch.sin)
    moments = capture_hessians(layer, sites, whole, through)
    shared = capture_hessians(layer, sites, mine, through, ranks)
    for name, site in sites.items():
        one, two = expected[name], found[name]
        assert one.tokens == two.tokens == 32 * windows * site.passes
        assert torch.equal(one.sample, two.sample)
        assert torch.equal(one.amax, two.amax)
        calls = len(whole) * max(1, len(site.taps))
        for before, after in ((one.hessian, two.hessian), (moments[name], shared[name])):
            # Two float64 sums of as many terms, each off by calls * 2^-53 of their magnitudes,
            # which Cauchy and Schwarz bound by the diagonal; twice that for all second orders.
            size = (before.diagonal()[:, None] * before.diagonal()).sqrt() * one.tokens
            bound = 0 if ranks.exact else 4 * calls * 2.0**-53 * size * len(whole)
            assert bool(((before - after).abs() * one.tokens <= bound).all())
    alone = capture_experts(layer, family.experts, sites, whole, through)
    together = capture_experts(layer, family.experts, sites, mine, through, ranks)
    assert alone.keys() == together.keys()
    for name, experts in alone.items():
        for one, two in zip(experts, together[name], strict=True):
            assert one.tokens == two.tokens
            assert torch.equal(one.sample, two.sample)
            assert (one.hessian is None) == (two.hessian is None)
            if one.hessian is not None and two.hessian is not None:
                assert torch.equal(one.hessian(), two.hessian())


def choices_have_what_one_process_has(ranks: Ranks, family_name: str, windows: int) -> None:
    """How many tokens are held out, both parts of the statistics, and gradients."""
    import tiny_models

    family, model = tiny_models.FAMILIES[family_name], tiny_models.build(family_name)
    layer = model.get_submodule(f"{family.layers}.0")
    sites = {family.site_name(0, site): site for site in family.sites}
    ids = tiny_models.tokens(windows, 32)
    whole = list(each_first_input(model, family, ids, least=2))
    mine = list(each_first_input(model, family, ids, ranks=ranks, least=2))
    held_out = hold_out(whole)
    assert hold_out(mine, ranks) == held_out == whole[-1].tokens
    alone = capture_split(layer, sites, whole, 1, held_out)
    together = capture_split(layer, sites, mine, 1, held_out, ranks)
    for name in sites:
        for one, two in zip(alone[name], together[name], strict=True):
            assert one.tokens == two.tokens
            assert torch.equal(one.sample, two.sample)
            assert torch.equal(one.amax, two.amax)
            if ranks.exact:
                assert torch.equal(one.hessian, two.hessian)
    expected = capture_gradients(layer, sites, whole, 1)
    found = capture_gradients(layer, sites, mine, 1, ranks)
    for name in sites:
        assert torch.equal(expected[name].rows, found[name].rows)
        assert torch.equal(expected[name].output_weights, found[name].output_weights)


def a_missing_rank_is_an_error(ranks: Ranks) -> None:
    """The last step: rank 1 leaves, and rank 0 says so."""
    if ranks.leads:
        with pytest.raises(RankError, match=r"rank 0 of 2[^$]*another rank ended"):
            ranks.wait()


def main() -> None:
    statistics._PANEL, statistics.SAMPLE_TOKENS = 16, 16
    sys.modules["mxtorq.calibration.capture"].BATCH_TOKENS = 64  # type: ignore[attr-defined]
    with ranks_from_environment(CPU) as ranks:
        everything_arrives(ranks)
        transforms_arrive(ranks)
        for exact in (False, True):
            same = Ranks(rank=ranks.rank, size=ranks.size, exact=exact)
            for family, windows in (("llama", 2), ("llama", 10), ("qwen3_moe", 9)):
                sums_are_those_of_one_process(same, family, windows)
                choices_have_what_one_process_has(same, family, windows)
        a_missing_rank_is_an_error(ranks)
    sys.stdout.write(f"all is well on {Path(__file__).name}\n")


if __name__ == "__main__":
    main()
