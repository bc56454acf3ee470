"""Statistics of the first and of the last tokens are those of two captures."""

import pytest
import torch

import tiny_models
from mxtorq.calibration.capture import batches, capture_sites, capture_split, first_layer_inputs
from mxtorq.calibration.statistics import SiteAccumulator, SplitAccumulator
from mxtorq.errors import ModelError
from mxtorq.models.family import SiteName
from mxtorq.transforms.base import SiteStatistics


def same(one: SiteStatistics, two: SiteStatistics) -> bool:
    assert (one.site, one.name, one.tokens) == (two.site, two.name, two.tokens)
    assert all(map(torch.equal, one.weights, two.weights))
    parts = ((one.hessian, two.hessian), (one.amax, two.amax), (one.sample, two.sample))
    return all(torch.equal(mine, theirs) for mine, theirs in parts)


@pytest.mark.parametrize("sampled", [1024, 20])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_both_parts_are_those_of_captures_of_their_own(
    name: str, sampled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By equality, at a site inside of experts too, where a token has several inputs, in as many
    calls of different lengths as there are experts."""
    monkeypatch.setattr("mxtorq.calibration.capture.BATCH_TOKENS", 32)
    monkeypatch.setattr("mxtorq.calibration.statistics.SAMPLE_TOKENS", sampled)
    family, model = tiny_models.FAMILIES[name], tiny_models.build(name)
    layer = model.get_submodule(f"{family.layers}.0")
    sites = {family.site_name(0, site): site for site in family.sites}
    inputs = first_layer_inputs(model, family, tiny_models.tokens(9, 16))
    assert [item.tokens for item in inputs] == [32, 32, 32, 32, 16]
    found = capture_split(layer, sites, inputs, seed=3, held_out=48)
    seen = capture_sites(layer, sites, inputs[:3], seed=3)
    unseen = capture_sites(layer, sites, inputs[3:], seed=3)
    for full_name, site in sites.items():
        first, last = found[full_name]
        assert (first.tokens, last.tokens) == (96 * site.passes, 48 * site.passes)
        assert len(first.sample) == min(first.tokens, sampled)
        assert same(first, seen[full_name])
        assert same(last, unseen[full_name])
        assert not torch.equal(first.hessian, last.hessian)


def test_the_boundary_is_a_position_whoever_adds() -> None:
    """As ranks do that have every other batch: two of them, by hand."""
    rows = torch.randn(5, 10, 32, generator=torch.Generator().manual_seed(0))
    ranks = [SplitAccumulator("s", 32, 50, held_out=20, seed=1) for _ in range(2)]
    for number, batch in enumerate(rows):
        ranks[number % 2].seek(10 * number)
        ranks[number % 2].add(batch)
    parts = [each.finish(SiteName.DOWN_IN, ()) for each in ranks]
    assert [[side.tokens for side in part] for part in parts] == [[20, 10], [10, 10]]
    assert torch.equal(
        torch.cat([parts[0][0].sample, parts[1][0].sample]), rows[[0, 2, 1]].view(-1, 32)
    )
    assert torch.equal(parts[0][1].sample, rows[4])
    assert torch.equal(parts[1][1].sample, rows[3])


def test_without_second_moments() -> None:
    rows = torch.randn(8, 32)
    split = SplitAccumulator("s", 32, 8, held_out=2, seed=0, hessian=False)
    split.add(rows[:6])
    split.add(rows[6:])
    first, last = split.finish(SiteName.O_IN, ())
    assert first.second_moment is last.second_moment is None
    assert torch.equal(last.amax, rows[6:].abs().amax(0))


def test_what_is_held_out_is_looked_at_too() -> None:
    split = SplitAccumulator("model.layers.1.o_in", 32, 8, held_out=2, seed=0)
    split.add(torch.zeros(6, 32))
    where = r"model\.layers\.1\.o_in\n.* tokens 6 to 7"  # as the text counts them
    with pytest.raises(ModelError, match=where):
        split.add(torch.full((2, 32), torch.inf))


def test_as_one_accumulator_when_nothing_is_held_out() -> None:
    rows = torch.randn(12, 32)
    split, plain = SplitAccumulator("s", 32, 12, 0, seed=4), SiteAccumulator("s", 32, 12, seed=4)
    for part in rows.split(5):
        split.add(part)
        plain.add(part)
    first, last = split._first, split._last
    assert same(first.finish(SiteName.O_IN, ()), plain.finish(SiteName.O_IN, ()))
    assert last._seen == 0


@pytest.mark.parametrize(
    ("windows", "least", "sizes"),
    [
        (8, 1, [8]),
        (8, 2, [4, 4]),
        (3, 2, [1, 1, 1]),
        (2, 2, [1, 1]),
        (1, 2, [1]),  # as many batches as there are windows
        (300, 2, [128, 128, 44]),
    ],
)
def test_at_least_so_many_batches(windows: int, least: int, sizes: list[int]) -> None:
    ids = torch.zeros(windows, 32, dtype=torch.int64)
    assert [len(batch) for batch in batches(ids, least)] == sizes
