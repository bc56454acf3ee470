"""Where a diagonal can be merged: who is asked about the source, and who about its channels."""

import pytest

import tiny_models
from mxtorq.surgery.rescale import can_merge, merges


@pytest.mark.parametrize(
    ("name", "expected"),
    [("qwen2", [True, False, True, True]), ("qwen3_moe", [True, False, False, True])],
)
def test_each_channel_needs_a_source_of_its_own(name: str, expected: list[bool]) -> None:
    """Which o_in has not where heads share keys and values; a router reads what experts read."""
    family, model = tiny_models.FAMILIES[name], tiny_models.build(name)
    layer = model.get_submodule(f"{family.layers}.0")
    assert [merges(layer, site) for site in family.sites] == expected


def test_a_source_is_a_norm_or_quantized_itself() -> None:
    family, model = tiny_models.FAMILIES["qwen2"], tiny_models.build("qwen2")
    layer = model.get_submodule(f"{family.layers}.0")
    sites = {family.site_name(0, site): site for site in family.sites}
    by = {site.name: site for site in sites.values()}
    assert [can_merge(layer, sites, site) for site in by.values()] == [True] * 4
    without = {name: site for name, site in sites.items() if site.name != "qkv_in"}
    assert not can_merge(layer, without, by["o_in"])  # v_proj stays as it is
    assert can_merge(layer, without, by["gate_up_in"])
