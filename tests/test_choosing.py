"""What a method that chooses is given of a layer, and what a run keeps of its choices."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from mxtorq import pipeline
from mxtorq.calibration import capture
from mxtorq.calibration.capture import LayerInput, capture_sites, first_layer_inputs
from mxtorq.choosing import (
    hold_out,
    is_plain,
    joined_,
    least_batches,
    require_windows,
    statistics_to_choose_by,
)
from mxtorq.config import Recipe, parse_method, parse_rounding
from mxtorq.errors import CheckpointError, UsageError
from mxtorq.export.manifest import Manifest
from mxtorq.export.targets import Target, runs
from mxtorq.formats import mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.models.family import Site
from mxtorq.ranks import Ranks
from mxtorq.transforms.base import Transform
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.chain import chain
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.rotation import BlockRotation, Identity

FEW = "mxtorq:candidates=identity+smoothquant+hadamard+wush+layer-32"


def recipe(story: Path | str, method: str = FEW, **changes: Any) -> Recipe:
    return Recipe(
        **{
            "method": parse_method(method),
            "rounding": parse_rounding("gptq:inputs=corrected"),
            "calibration": str(story),
            "calibration_tokens": 512,
            "seqlen": 64,
            **changes,
        }
    )


def first(
    name: str, windows: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.nn.Module, dict[str, Site], list[LayerInput]]:
    """A layer, its sites, and batches of two windows."""
    monkeypatch.setattr(capture, "BATCH_TOKENS", 64)
    family, model = tiny_models.FAMILIES[name], tiny_models.build(name)
    inputs = first_layer_inputs(model, family, tiny_models.tokens(windows, 32))
    sites = {family.site_name(0, site): site for site in family.sites}
    return model.get_submodule(f"{family.layers}.0"), sites, inputs


def some(*tokens: int) -> list[LayerInput]:
    return [LayerInput(torch.zeros(1, count, 32), {}) for count in tokens]


@dataclass(frozen=True, kw_only=True)
class Said(Ranks):
    """Several ranks, of which it is known what they say."""

    said: Sequence[Any] = ()

    def all_json(self, value: Any) -> list[Any]:
        assert value == self.said[self.rank]
        return list(self.said)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([8, 5], 5),
        ([8] * 8, 8),
        ([8] * 16, 16),
        ([8] * 15 + [3], 11),
        ([64] * 10 + [1], 1),  # whole batches, one of them at least
        ([64] * 11 + [1], 65),  # 12 / 8 is 1.5, and 2 is even
    ],
)
def test_an_eighth_of_the_batches_is_held_out(sizes: list[int], expected: int) -> None:
    assert hold_out(some(*sizes)) == expected
    # Batch b belongs to rank b % size.
    for size in (2, 3, 5):
        said = [sizes[rank::size] for rank in range(size)]
        for rank in range(size):
            ranks = Said(rank=rank, size=size, said=said)
            assert hold_out(some(*said[rank]), ranks) == expected


def test_one_window_alone_is_refused() -> None:
    with pytest.raises(UsageError, match="one window") as caught:
        require_windows(parse_method("mxtorq"), 1)
    assert all(vars(caught.value).get(part) for part in ("asked", "found", "why", "todo"))
    require_windows(parse_method("mxtorq"), 2)
    require_windows(parse_method("wush"), 1)
    assert (least_batches(parse_method("mxtorq")), least_batches(parse_method("wush"))) == (2, 1)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_joined_statistics_are_those_of_all_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the sample, which is that of the first ones."""
    layer, sites, inputs = first(name, 9, monkeypatch)
    settings = recipe("stdlib")
    seen, held_out = statistics_to_choose_by(layer, sites, inputs, settings)
    for full_name in sites:
        judgement = seen[full_name].judgement
        assert judgement is not None
        assert torch.equal(judgement.held_out, held_out[full_name].sample)
        assert held_out[full_name].judgement is None
        assert len(judgement.output_weights) == sum(map(len, seen[full_name].weights))
    joined = joined_(seen, held_out)
    assert held_out == {}
    for full_name, all_of in capture_sites(layer, sites, inputs, settings.seed).items():
        found = joined[full_name]
        assert found.judgement is None
        assert found.tokens == all_of.tokens == 9 * 32 * sites[full_name].passes
        assert torch.equal(found.amax, all_of.amax)
        assert torch.equal(found.sample, seen[full_name].sample)
        # Two sums in float64, each of four roundings more: divided, multiplied twice and added.
        # Calls of a step, and of entries the diagonal bounds the magnitudes (Cauchy-Schwarz).
        size = (all_of.hessian.diagonal()[:, None] * all_of.hessian.diagonal()).sqrt()
        calls = len(inputs) * len(sites[full_name].taps)
        bound = (2 * calls + 8) * 2.0**-53 * size * calls
        assert ((found.hessian - all_of.hessian).abs() <= bound).all()


def test_what_candidates_are_judged_by_is_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, sites, inputs = first("llama", 4, monkeypatch)
    for rounding, corrected in (("gptq", False), ("gptq:inputs=corrected", True), ("rtn", False)):
        for target, scale in ((Target.MXTORQ, ScaleRule.FLOOR), (Target.ROCM, ScaleRule.EVEN)):
            settings = recipe("stdlib", rounding=parse_rounding(rounding), target=target)
            seen, _ = statistics_to_choose_by(layer, sites, inputs, settings)
            for each in seen.values():
                assert each.judgement is not None
                assert (each.judgement.activations, each.judgement.corrected) == (scale, corrected)
    weight = torch.randn(8, 64)  # of the last: to the nearest, by the scales of weights
    assert each.judgement.rounded(weight, lambda: torch.eye(64)).equal(mxfp4.fake_quantize(weight))


def test_who_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, sites, _ = first("qwen2", 1, monkeypatch)
    assert [is_plain(layer, site) for site in sites.values()] == [False, True, True, True]
    layer, sites, _ = first("qwen3_moe", 1, monkeypatch)
    assert [is_plain(layer, site) for site in sites.values()] == [True, True, False, False]
    layer, sites, _ = first("llama", 1, monkeypatch)
    assert not any(is_plain(layer, site) for site in sites.values())


def transforms(width: int) -> dict[str, Transform]:
    diagonal = Diagonal(torch.rand(width, dtype=torch.float64) + 0.5)
    shared = BlockRotation(width, sylvester(32))
    own = BlockMatrices(torch.randn(width // 32, 32, 32, dtype=torch.float64))
    return {
        "nothing": Identity(width),
        "factors": diagonal,
        "one matrix": shared,
        "matrices": own,
        "factors, one matrix": chain(diagonal, shared),
        "factors, matrices": chain(diagonal, own),
        "one matrix, factors": chain(shared, diagonal),
    }


def test_what_targets_run() -> None:
    """Of what is left online: one matrix for all blocks before plain linears, or nothing."""
    for name, each in transforms(64).items():
        for target in Target:
            for plain in (False, True):
                found = runs(each, target, plain=plain)
                if target is Target.MXTORQ or name == "nothing":
                    assert found
                elif target is Target.TRANSFORMERS:
                    assert not found
                else:
                    assert found == (plain and name == "one matrix")


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe"])
def test_what_a_site_can_have(name: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagonal that will be merged is not run, and costs nothing; one before grouped-query
    attention, or before a router, stays."""
    layer, sites, inputs = first(name, 4, monkeypatch)
    settings = recipe("stdlib", target=target, rounding=parse_rounding("rtn"))
    seen, _ = statistics_to_choose_by(layer, sites, inputs, settings)
    for full_name, site in sites.items():
        judgement = seen[full_name].judgement
        assert judgement is not None
        routed = name == "qwen3_moe" and site.name == "gate_up_in"
        merged = site.name != "o_in" and not routed
        biased = name == "qwen2" and site.name == "qkv_in"
        plain = not biased and not site.experts
        for what, each in transforms(seen[full_name].width).items():
            left = what.removeprefix("factors").removeprefix(", ") if merged else what
            one = left in ("", "nothing") or (left == "one matrix" and plain)
            engine = left in ("", "nothing") if target is Target.TRANSFORMERS else one
            assert judgement.stock(each) == one, (full_name, what)
            assert judgement.runs(each) == (target is Target.MXTORQ or engine)
            starts = what.startswith("factors")
            less = each.width if merged and starts else 0
            assert judgement.multiply_adds(each) == each.multiply_adds - less


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_a_run_keeps_what_was_compared(
    name: str, tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """At every site: the candidate, the losses of which it is the least, and what the others lose
    at least. JSON gives it back."""
    settings = recipe(story)
    done = pipeline.quantize(str(tiny_folders[name]), tmp_path / "out", settings, device="cpu")
    names = {"identity", "smoothquant", "hadamard", "wush", "layer-32"}
    assert len(done.sites) == 8
    for entry in done.sites:
        assert entry.choice is not None
        assert set(entry.choice) == {"candidate", "losses", "at_least"}
        losses, at_least = entry.choice["losses"], entry.choice["at_least"]
        assert {*losses, *at_least} == names
        assert losses[entry.choice["candidate"]] == min(losses.values())
        assert all(bound > min(losses.values()) for bound in at_least.values())
        assert 0 < min(losses.values()) < 0.2
    text = (tmp_path / "out" / "mxtorq.json").read_text()
    again = Manifest.from_json(text, "mxtorq.json")
    assert again == done
    assert again.to_json() == text
    damaged = json.loads(text)
    del damaged["sites"][0]["choice"]["losses"]
    with pytest.raises(CheckpointError, match="losses"):
        Manifest.from_json(json.dumps(damaged), "mxtorq.json")


def test_other_methods_have_no_choice_to_tell(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    settings = recipe(story, "hadamard", rounding=parse_rounding("rtn"))
    done = pipeline.quantize(str(tiny_folders["llama"]), tmp_path / "out", settings, device="cpu")
    assert all(entry.choice is None for entry in done.sites)
    assert '"choice"' not in done.to_json()


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """The choices of finished layers are read back, and the held-out text is the same."""
    model, settings = str(tiny_folders["llama"]), recipe(story)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantize", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model, tmp_path / "out", settings, device="cpu", progress=interrupt)
    pipeline.quantize(model, tmp_path / "out", settings, device="cpu")
    assert "going on: 1 layers" in (tmp_path / "out.log").read_text()
    pipeline.quantize(model, tmp_path / "one", settings, device="cpu")
    found, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("out", "one")
    )
    assert found == expected


def test_a_target_gets_what_it_runs(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """Where linears have biases nothing is left online, and with one matrix elsewhere."""
    rtn = parse_rounding("rtn")
    settings = recipe(story, target=Target.ROCM, scale_rule=ScaleRule.EVEN, rounding=rtn)
    for name, kinds in (
        ("llama", {"identity"}),
        ("qwen3", {"identity", "engine-matrix"}),
    ):
        out = tmp_path / name
        done = pipeline.quantize(str(tiny_folders[name]), out, settings, device="cpu")
        assert {entry.kind for entry in done.sites} <= kinds
        assert all(entry.choice is not None for entry in done.sites)


def test_a_text_of_one_window_is_refused_and_leaves_nothing(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    settings = recipe(story, calibration_tokens=64)
    with pytest.raises(UsageError, match="one window"):
        pipeline.quantize(str(tiny_folders["llama"]), tmp_path / "out", settings, device="cpu")
    assert not (tmp_path / "out").exists()
