"""What a terminal shows of a checkpoint."""

import io
from dataclasses import replace

from rich.console import Console

from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.reports.contents import checkpoint_facts, checkpoint_sites

ENTRY = SiteEntry(
    site="model.layers.0.down_in",
    linears=["a"],
    width=64,
    kind="torq",
    multiply_adds=5,
    extra_bytes=7,
    output_error=0.25,
)
MANIFEST = Manifest(
    method="torq",
    rounding="rtn",
    recipe={"method": {"name": "torq", "levels": "both"}, "rounding": {"name": "rtn"}},
    scale_rules={"weights": "floor", "activations": "floor"},
    seed=3,
    source={"model": "m", "family": "llama", "baseline_dtype": "bfloat16", "outliers": None},
    calibration={"source": "stdlib", "tokens": 64, "seqlen": 32, "seed": 3},
    versions={"mxtorq": "0"},
    sites=[ENTRY],
    unfit={},
    files={},
)


def shown(manifest: Manifest) -> str:
    page = io.StringIO()
    Console(file=page, width=300).print(
        checkpoint_facts(manifest, "here"), checkpoint_sites(manifest)
    )
    return page.getvalue()


def test_experts_that_saw_few_tokens_are_counted_over_all_sites() -> None:
    sites = [
        replace(ENTRY, experts={"count": 128, "pooled": 5, "unseen": 1}),
        replace(ENTRY, experts={"count": 128, "pooled": 7, "unseen": 0}),
        ENTRY,
    ]
    assert "12 of 256 (over all sites)" in shown(replace(MANIFEST, sites=sites))
    assert "experts" not in shown(MANIFEST)


def test_what_was_chosen_is_counted_and_told_of_each_site() -> None:
    other = replace(ENTRY, site="model.layers.1.down_in")
    choice = {"candidate": "[red]wush", "losses": {"[red]wush": 0.5}, "at_least": {}}
    page = shown(replace(MANIFEST, sites=[replace(ENTRY, choice=choice), other]))
    assert "[red]wush at 1 of 1 site" in page
    (chosen,) = [line for line in page.splitlines() if "layers.0" in line]
    (plain,) = [line for line in page.splitlines() if "layers.1" in line]
    assert "│ [red]wush │" in chosen
    assert "│ -         │" in plain
    assert "chosen" not in shown(replace(MANIFEST, sites=[ENTRY, other]))
