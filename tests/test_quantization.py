"""What happens inside of a model: who gets which Hessian, what is merged, what stays online."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import hooked_experts
import tiny_models
from mxtorq import pipeline, quantization
from mxtorq.calibration import statistics as statistics_module
from mxtorq.calibration.capture import capture_sites, first_layer_inputs
from mxtorq.config import Recipe, parse_method, parse_rounding
from mxtorq.errors import UsageError
from mxtorq.formats import mxfp4
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.scales import Scale
from mxtorq.loading.checkpoint import load
from mxtorq.moments import rounding_moments_
from mxtorq.quantization import merge_diagonals_, quantize_
from mxtorq.rounding.base import Rounding


@dataclass(frozen=True, kw_only=True)
class Spy(Rounding):
    """Rounds to nearest and remembers what it was given."""

    rounded: bool = False
    compensating: bool = False
    correcting: bool = False
    moments: ClassVar[list[tuple[torch.Tensor, ...]]] = []
    seen: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []

    @property
    def sees_rounded_inputs(self) -> bool:
        return self.rounded

    @property
    def compensates(self) -> bool:
        return self.compensating

    @property
    def corrects_inputs(self) -> bool:
        return self.correcting

    def correction(self, *moments: torch.Tensor) -> torch.Tensor:
        self.moments.append(moments)
        return 2.0 * torch.eye(len(moments[0]), dtype=torch.float64)

    def round(
        self, weight: torch.Tensor, hessian: Callable[[], torch.Tensor], scale: Scale
    ) -> MXFP4:
        self.seen.append((weight, hessian()))
        return mxfp4.quantize(weight, scale)  # type: ignore[arg-type]


def settings(story: Path, method: str, rounding: Rounding) -> Recipe:
    return Recipe(
        method=parse_method(method),
        rounding=rounding,
        calibration=str(story),
        calibration_tokens=512,
        seqlen=64,
    )


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("method", ["hadamard", "duquant++:steps=4", "wush"])
def test_a_rounding_gets_stacked_weights_and_the_hessian_of_their_inputs(
    method: str, rounded: bool, tiny_folders: dict[str, Path], story: Path
) -> None:
    recipe = settings(story, method, Spy(rounded=rounded))
    source = pipeline.load_model(str(tiny_folders["qwen3"]), None, 0, "cpu")
    untouched = pipeline.load_model(str(tiny_folders["qwen3"]), None, 0, "cpu")
    windows = pipeline.calibrate(source, recipe)
    Spy.seen.clear()
    quantize_(source, windows.ids, recipe, pipeline.silent)

    # The first layer by hand: 512 tokens are all in the sample.
    family = untouched.family
    layer = untouched.model.get_submodule(f"{family.layers}.0")
    sites = {family.site_name(0, site): site for site in family.sites}
    statistics = capture_sites(
        layer, sites, first_layer_inputs(untouched.model, family, windows.ids), recipe.seed
    )
    fitted = {name: recipe.method.fit(statistics[name], recipe.seed) for name in sites}
    rest, statistics = merge_diagonals_(layer, sites, fitted, statistics)
    for name, (weight, hessian) in zip(sites, Spy.seen, strict=False):
        rows = rest[name].apply(statistics[name].sample)
        if rounded:
            rows = mxfp4.fake_quantize(rows)
        expected = rows.double().T @ rows.double() / len(rows)
        # float32 activations, transformed in float32 here and their moment in float64 there
        bound = 512 * torch.finfo(torch.float32).eps * expected.diagonal().max()
        if not rounded:
            assert (hessian - expected).abs().max() <= bound, name
        else:  # an activation next to a cut may fall to its other side
            assert (hessian - expected).norm() <= 1e-2 * expected.norm(), name
            plain = rest[name].apply(rest[name].apply(statistics[name].hessian).T)
            assert (hessian - plain).norm() > (hessian - expected).norm()
        stacked = rest[name].fuse(statistics[name].weight).float()
        assert torch.equal(weight, stacked)
    assert len(Spy.seen) == 8


def test_moments_that_a_rounding_does_not_ask_for_end_with_the_fit(
    tiny_folders: dict[str, Path], story: Path
) -> None:
    recipe = settings(story, "wush", parse_rounding("rtn"))
    source = pipeline.load_model(str(tiny_folders["llama"]), None, 0, "cpu")
    family, ids = source.family, pipeline.calibrate(source, recipe).ids
    layer = source.model.get_submodule(f"{family.layers}.0")
    sites = {family.site_name(0, site): site for site in family.sites}
    inputs = first_layer_inputs(source.model, family, ids)
    statistics = capture_sites(layer, sites, inputs, recipe.seed)
    fitted = {name: recipe.method.fit(statistics[name], recipe.seed) for name in sites}
    moments = rounding_moments_(layer, sites, inputs, fitted, statistics, recipe)
    for name in sites:
        assert statistics[name].second_moment is None
        with pytest.raises(UsageError, match="without it"):
            moments[name].hessian()


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("method", ["wush", "smoothquant:sites=all"])
def test_a_correction_gets_the_moments_of_plain_and_rounded_inputs(
    method: str,
    rounded: bool,
    tiny_folders: dict[str, Path],
    story: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mxtorq.moments.CORRECTION_BLOCK", 40)  # the last block has what is left
    monkeypatch.setattr("mxtorq.rounding.correction.CORRECTION_BLOCK", 40)
    recipe = settings(story, method, Spy(correcting=True, rounded=rounded))
    source = pipeline.load_model(str(tiny_folders["qwen3"]), None, 0, "cpu")
    untouched = pipeline.load_model(str(tiny_folders["qwen3"]), None, 0, "cpu")
    windows = pipeline.calibrate(source, recipe)
    Spy.seen.clear()
    Spy.moments.clear()
    quantize_(source, windows.ids, recipe, pipeline.silent)
    assert len(Spy.seen) == 8

    family = untouched.family
    layer = untouched.model.get_submodule(f"{family.layers}.0")
    sites = {family.site_name(0, site): site for site in family.sites}
    statistics = capture_sites(
        layer, sites, first_layer_inputs(untouched.model, family, windows.ids), recipe.seed
    )
    fitted = {name: recipe.method.fit(statistics[name], recipe.seed) for name in sites}
    rest, statistics = merge_diagonals_(layer, sites, fitted, statistics)
    given = iter(Spy.moments)
    for name, (weight, hessian) in zip(sites, Spy.seen, strict=False):
        rows = rest[name].apply(statistics[name].sample)  # all 512 tokens
        after = mxfp4.fake_quantize(rows).double()
        rows = rows.double()
        bound = 512 * torch.finfo(torch.float32).eps * (rows.T @ rows).diagonal().max() / len(rows)
        for x, y in zip(rows.split(40, 1), after.split(40, 1), strict=True):
            plain, made, cross = next(given)
            assert (plain - x.T @ x / len(rows)).abs().max() <= bound, name
            for found, expected in ((made, y.T @ y), (cross, x.T @ y)):
                # An activation next to a cut may fall to its other side.
                assert (found - expected / len(rows)).norm() <= 1e-2 * found.norm(), name
            assert (cross - cross.T).norm() > 0
        seen = after if rounded else rows
        slack = 1e-2 * hessian.norm() if rounded else bound * len(hessian)
        assert (hessian - seen.T @ seen / len(rows)).norm() <= slack, name
        stacked = rest[name].fuse(statistics[name].weight).float()
        assert torch.equal(weight, 2.0 * stacked)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_smoothing_is_merged_but_for_grouped_query_attention(
    family: str, tiny_folders: dict[str, Path], story: Path
) -> None:
    recipe = settings(story, "duquant++:steps=4", parse_rounding("rtn"))
    source = pipeline.load_model(str(tiny_folders[family]), None, 0, "cpu")
    norm = source.model.model.layers[0].input_layernorm.weight
    before = norm.clone()
    windows = pipeline.calibrate(source, recipe)
    quantized = quantize_(source, windows.ids, recipe, pipeline.silent)
    kinds = {entry.site.rpartition(".")[2]: entry.kind for entry in quantized.sites}
    assert kinds == {
        "qkv_in": "block-rotation",
        "o_in": "chain",  # two query heads read each value head
        "gate_up_in": "block-rotation",
        "down_in": "block-rotation",
    }
    assert not torch.equal(norm, before)
    assert torch.equal(norm, norm.bfloat16().float())  # as a checkpoint keeps it


def test_a_matrix_that_stays_in_bfloat16_takes_no_factors(story: Path, tmp_path: Path) -> None:
    """qkv_in is 48 wide and unfit, so v_proj stays as it is, and o_in is smoothed online."""
    shape = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32}
    model = tiny_models.build("llama", **shape)
    folder = tiny_models.save(model, tmp_path / "model")
    source = pipeline.load_model(str(folder), None, 0, "cpu")
    values = source.model.model.layers[0].self_attn.v_proj.weight.clone()
    recipe = settings(story, "smoothquant:sites=all", parse_rounding("rtn"))
    recipe = Recipe(**{**recipe.__dict__, "allow_unfit": True})
    windows = pipeline.calibrate(source, recipe)
    quantized = quantize_(source, windows.ids, recipe, pipeline.silent)
    kinds = {entry.site.rpartition(".")[2]: entry.kind for entry in quantized.sites}
    assert kinds["o_in"] == "diagonal"
    assert torch.equal(source.model.model.layers[0].self_attn.v_proj.weight, values)
    pipeline.quantize(str(folder), tmp_path / "out", recipe, device="cpu")  # reads back equal


def test_rotations_leave_what_a_checkpoint_keeps_in_bfloat16(
    tiny_folders: dict[str, Path], story: Path
) -> None:
    recipe = settings(story, "quarot", parse_rounding("rtn"))
    source = pipeline.load_model(str(tiny_folders["qwen3"]), None, 0, "cpu")
    assert source.config.tie_word_embeddings
    windows = pipeline.calibrate(source, recipe)
    quantize_(source, windows.ids, recipe, pipeline.silent)
    assert not source.config.tie_word_embeddings
    for name, parameter in source.model.named_parameters():
        assert torch.equal(parameter, parameter.bfloat16().float()), name
    gains = source.model.model.norm.weight
    assert torch.equal(gains, torch.ones_like(gains))


@pytest.mark.parametrize(
    ("method", "rounding", "sums"),
    [("hadamard", "rtn", False), ("wush", "rtn", True), ("hadamard", "gptq", True)],
)
def test_second_moments_are_summed_only_for_someone(
    method: str,
    rounding: str,
    sums: bool,
    tiny_folders: dict[str, Path],
    story: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing else takes as long."""
    calls: list[int] = []
    real = statistics_module.add_products_

    def counted(total: torch.Tensor, rows: torch.Tensor, *panels: list[slice]) -> None:
        calls.append(len(rows))
        real(total, rows, *panels)

    monkeypatch.setattr(statistics_module, "add_products_", counted)
    recipe = settings(story, method, parse_rounding(rounding))
    source = pipeline.load_model(str(tiny_folders["qwen3"]), None, 0, "cpu")
    quantize_(source, pipeline.calibrate(source, recipe).ids, recipe, pipeline.silent)
    assert bool(calls) is sums


@pytest.mark.parametrize("rounded", [False, True])
def test_experts_are_rounded_with_the_hessian_of_their_own_tokens(
    rounded: bool, tiny_folders: dict[str, Path], story: Path
) -> None:
    """Those that saw fewer tokens than the site is wide with that of all, and the entry says so."""
    recipe = settings(story, "hadamard", Spy(rounded=rounded, compensating=True))
    source = pipeline.load_model(str(tiny_folders["qwen3_moe"]), None, 0, "cpu")
    untouched = pipeline.load_model(str(tiny_folders["qwen3_moe"]), None, 0, "cpu")
    windows = pipeline.calibrate(source, recipe)
    Spy.seen.clear()
    quantized = quantize_(source, windows.ids, recipe, pipeline.silent)
    assert len(Spy.seen) == 2 * (2 + 4 + 4)  # qkv, o, and each expert twice, a layer

    family = untouched.family
    layer = untouched.model.get_submodule(f"{family.layers}.0")
    sites = {family.site_name(0, site): site for site in family.sites}
    inputs = first_layer_inputs(untouched.model, family, windows.ids)
    statistics = capture_sites(layer, sites, inputs, recipe.seed)
    rows: dict[str, list[torch.Tensor]] = {}
    for site in family.sites[2:]:
        for path in site.linears:
            layer.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path: rows.setdefault(path, []).append(args[0])
            )
    for item in inputs:
        layer(item.hidden, **item.arguments)
    entries = {entry.site: entry for entry in quantized.sites}
    calls = iter(Spy.seen[2:])
    pooled = 0
    for name, site in list(sites.items())[2:]:
        transform = recipe.method.fit(statistics[name], recipe.seed)
        few = 0
        for group in site.groups:
            weight, hessian = next(calls)
            fused = [transform.fuse(layer.get_submodule(p).weight.double()) for p in group]
            assert torch.equal(weight, torch.cat(fused).float())
            own = torch.cat(rows.get(group[0], [torch.empty(0, transform.width)]))
            few += len(own) < transform.width
            if len(own) < transform.width:
                own = statistics[name].sample  # all tokens of gate_up_in, and of down_in
                assert len(own) == statistics[name].tokens
            values = transform.apply(own)
            values = (mxfp4.fake_quantize(values) if rounded else values).double()
            expected = values.T @ values / len(values)
            # As above: in float32 here, and an activation next to a cut may fall to its other side.
            assert (hessian - expected).norm() <= (1e-2 if rounded else 1e-5) * expected.norm()
        assert entries[name].experts == {"count": 4, "pooled": few, "unseen": 0}
        assert len(entries[name].linears) == len(site.linears)
        pooled += few
    assert 0 < pooled < 8  # both happen


@pytest.mark.parametrize(
    "rounding", ["rtn", "gptq", "gptq:inputs=rounded", "gptq:inputs=corrected"]
)
def test_experts_get_the_codes_that_moments_beforehand_would_give(
    rounding: str, tiny_folders: dict[str, Path], story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """down_in is rounded when gate_proj and up_proj are quantized, and must not see that."""
    monkeypatch.setattr("mxtorq.calibration.capture.BATCH_TOKENS", 128)  # several batches
    recipe = settings(story, "torq:levels=inter", parse_rounding(rounding))
    found = []
    for beforehand in (False, True):
        if beforehand:
            monkeypatch.setattr(
                quantization,
                "capture_experts",
                lambda layer, experts, *rest: hooked_experts.capture(layer, *rest[:3]),
            )
        source = pipeline.load_model(str(tiny_folders["qwen3_moe"]), None, 0, "cpu")
        done = quantize_(source, pipeline.calibrate(source, recipe).ids, recipe, pipeline.silent)
        found.append((source.model.state_dict(), done.sites))
    (mine, my_entries), (theirs, their_entries) = found
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert my_entries == their_entries
    pooled = [entry.experts["pooled"] for entry in my_entries if entry.experts]
    assert 0 < sum(pooled) < 4 * len(pooled)


@pytest.mark.parametrize(
    "rounding", ["rtn", "gptq", "gptq:inputs=rounded", "gptq:inputs=corrected"]
)
def test_experts_without_tokens_are_rounded_all_the_same(
    rounding: str, story: Path, tmp_path: Path
) -> None:
    """The router's rows v, -v, u, -u, 0, 0: two of the first four are always above the last two."""
    model = tiny_models.build("qwen3_moe", num_local_experts=6)
    for layer in model.model.layers:
        rows = layer.mlp.gate.weight
        rows[1], rows[3], rows[4:] = -rows[0], -rows[2], 0.0
    folder = tiny_models.save(model, tmp_path / "model")
    recipe = settings(story, "torq:levels=inter", parse_rounding(rounding))
    manifest = pipeline.quantize(str(folder), tmp_path / "out", recipe, device="cpu")
    for entry in manifest.sites:
        if entry.experts is None:
            assert "qkv_in" in entry.site or "o_in" in entry.site
            continue
        assert (entry.experts["count"], entry.experts["unseen"]) == (6, 2)
        assert 2 <= entry.experts["pooled"] < 6
        assert 0 < entry.output_error < 0.1
    weights = load(tmp_path / "out", device="cpu").get_submodule("model.layers.0.mlp.experts.5")
    plain = mxfp4.quantize(
        weights.down_proj.transform.fuse(
            model.get_submodule("model.layers.0.mlp.experts.5.down_proj").weight.double()
        ).float()
    )
    same = torch.equal(plain.packed, weights.down_proj.weight_packed)
    assert same == (rounding == "rtn")  # the moment of the other experts' tokens is at work
