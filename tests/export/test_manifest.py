"""The manifest goes to JSON and back, and unknown versions and fields are refused."""

import json
from dataclasses import asdict, replace

import pytest

from mxtorq.errors import CheckpointError
from mxtorq.export.manifest import SCHEMA, VERSION, Manifest, SiteEntry

ENTRY = SiteEntry(
    site="model.layers.0.qkv_in",
    linears=["a", "b"],
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
    source={"model": "reference", "family": "llama", "outliers": None},
    calibration={"source": "stdlib", "tokens": 512, "seqlen": 64, "seed": 3},
    versions={"mxtorq": "0.1.0"},
    sites=[ENTRY],
    unfit={},
    files={"model.safetensors": {"sha256": "0", "bytes": 1}},
)


def test_there_and_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), "here") == MANIFEST
    assert MANIFEST.mean_output_error == 0.25
    assert (MANIFEST.multiply_adds_per_token, MANIFEST.extra_bytes) == (5, 7)


def test_an_error_without_its_point_is_a_float() -> None:
    again = Manifest.from_json(changed(sites=[{**asdict(ENTRY), "output_error": 1}]), "here")
    assert type(again.sites[0].output_error) is float


def test_experts_are_there_where_there_are_any() -> None:
    counts = {"count": 4, "pooled": 1, "unseen": 0}
    shared = replace(MANIFEST, sites=[ENTRY, replace(ENTRY, experts=counts)])
    assert Manifest.from_json(shared.to_json(), "here") == shared
    plain, several = json.loads(shared.to_json())["sites"]
    assert "experts" not in plain
    assert several["experts"] == counts


CHOICE = {"candidate": "wush", "losses": {"wush": 0.5, "perq": 1}, "at_least": {"identity": 0.75}}


def test_choices_are_there_where_there_are_any() -> None:
    chosen = replace(MANIFEST, sites=[ENTRY, replace(ENTRY, choice=CHOICE)])
    assert Manifest.from_json(chosen.to_json(), "here") == chosen
    plain, chosen_entry = json.loads(chosen.to_json())["sites"]
    assert "choice" not in plain
    assert chosen_entry["choice"] == CHOICE


def changed(**fields: object) -> str:
    return json.dumps({**json.loads(MANIFEST.to_json()), **fields})


def without(name: str) -> str:
    return json.dumps({k: v for k, v in json.loads(MANIFEST.to_json()).items() if k != name})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ("{}", "schema None"),
        ('{"schema": ', "damaged"),
        (changed(version=VERSION + 1), f"reads {SCHEMA} version {VERSION} only"),
        (changed(schema="other"), "schema 'other'"),
        (changed(extra=1), "extra"),
        (without("seed"), "seed"),
        (changed(sites=[{"site": "x"}]), "site entry"),
        (changed(sites=5), "damaged"),
        (changed(sites=[5]), "a site entry of type int"),
        (changed(seed="3"), "seed is of type int"),
        (changed(files=[]), "files is of type dict"),
        (changed(files={"a": {"bytes": 1}}), "a without sha256"),
        (changed(files={"a": {"bytes": "1", "sha256": "0"}}), "bytes is of type int"),
        (changed(scale_rules={"weights": "floor"}), "scale_rules without activations"),
        (changed(sites=[{**asdict(ENTRY), "output_error": -1.0}]), "negative output_error"),
        (
            changed(sites=[{**asdict(ENTRY), "experts": {"count": 4, "pooled": 1}}]),
            "without unseen",
        ),
        (
            changed(sites=[{**asdict(ENTRY), "experts": {"count": 0, "pooled": 0, "unseen": 0}}]),
            "with 0 experts",
        ),
        (
            changed(sites=[{**asdict(ENTRY), "choice": {**CHOICE, "losses": {"wush": "1"}}}]),
            "losses is of type dict",
        ),
        (
            changed(sites=[{**asdict(ENTRY), "choice": {**CHOICE, "losses": {"perq": 1.0}}}]),
            "a candidate whose loss is not told",
        ),
        ("[" * 100_000, "RecursionError"),
        ('{"schema": "mxtorq.manifest", "schema": "mxtorq.manifest"}', "stands there twice"),
    ],
)
def test_what_it_does_not_know_is_refused(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(text, "here")
