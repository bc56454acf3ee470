"""A whole run on tiny models: what is written is what was computed, and the same each time."""

import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from mxtorq import pipeline
from mxtorq.calibration.capture import advance_, capture_sites, first_layer_inputs
from mxtorq.comparison import compare
from mxtorq.config import EvaluationPlan, Recipe, parse_method, parse_rounding
from mxtorq.errors import (
    CheckpointError,
    ModelError,
    OutputError,
    TextError,
    UsageError,
    VerificationError,
)
from mxtorq.export.checkpoint import read_checkpoint
from mxtorq.export.targets import Target
from mxtorq.formats import reference
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4, dequantize
from mxtorq.loading.checkpoint import build_model, load
from mxtorq.loading.source import Source
from mxtorq.loading.writer import stored_tensors
from mxtorq.quantization import quantize_
from mxtorq.surgery.linear import MXFP4Linear, fused_weight
from mxtorq.transforms import METHODS as ALL
from tiny_models import FAMILIES

METHODS = [
    *(name for name in ALL if name not in ("duquant++", "duquant", "brq", "spinquant")),
    "duquant++:steps=8",
    "duquant:steps=8:block=32",
    "brq:size=16",
    "spinquant:steps=2",
]


def recipe(method: str, text: Path, **changes: object) -> Recipe:
    settings: dict[str, object] = {
        "method": parse_method(method),
        "calibration": str(text),
        "calibration_tokens": 512,
        "seqlen": 64,
        **changes,
    }
    return Recipe(**settings)  # type: ignore[arg-type]


SOME = ("identity", "torq", "duquant++:steps=8", "quarot")
"""One method of each way to change a model: for families whose plan another family has."""
CASES = [
    (family, method)
    for family in FAMILIES
    for method in METHODS
    if method in SOME or family in ("llama", "qwen3")
]


@pytest.fixture(scope="module")
def written(
    tiny_folders: dict[str, Path], story: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """A checkpoint of every tiny model by every method."""
    root = tmp_path_factory.mktemp("written")
    folders = {}
    for family, method in CASES:
        out = root / f"{family}-{method.replace(':', '-')}"
        model = str(tiny_folders[family])
        pipeline.quantize(model, out, recipe(method, story), device="cpu")
        folders[family, method] = out
    return folders


LOCAL = ("identity", "hadamard", "torq", "wush", "perq")
"""Methods that change a linear by its own transform alone and merge nothing elsewhere."""


@pytest.mark.parametrize("case", CASES)
def test_disk_memory_and_reference_are_the_same_bits(
    case: tuple[str, str],
    written: dict[tuple[str, str], Path],
    tiny_folders: dict[str, Path],
    story: Path,
) -> None:
    family = FAMILIES[case[0]]
    source = pipeline.load_model(str(tiny_folders[case[0]]), None, 0, "cpu")
    settings = recipe(case[1], story)
    windows = pipeline.calibrate(source, settings)
    quantize_(source, windows.ids, settings, pipeline.silent)
    stored = read_checkpoint(written[case]).weights
    replaced = {n: m for n, m in source.model.named_modules() if isinstance(m, MXFP4Linear)}
    assert len(replaced) == 2 * sum(len(site.linears) for site in family.sites)
    for name, module in replaced.items():
        packed = stored.tensor(f"{name}.weight_packed")
        scales = stored.tensor(f"{name}.weight_scale")
        assert torch.equal(packed, module.weight_packed)
        assert torch.equal(scales, module.weight_scale)
        values = dequantize(MXFP4(packed, scales))
        for row in (0, len(packed) - 1):  # the reference decoder, a row at each end
            for column in range(0, values.shape[1], 7):
                byte = int(packed[row, column // 2])
                code = byte >> 4 if column % 2 else byte & 15
                exact = reference.element_value(code, int(scales[row, column // 32]))
                assert exact == Fraction(values[row, column].item())


@pytest.mark.parametrize("case", [case for case in CASES if case[1] in LOCAL])
def test_weights_are_the_reference_rounding_of_the_fused_weight(
    case: tuple[str, str],
    written: dict[tuple[str, str], Path],
    tiny_folders: dict[str, Path],
) -> None:
    family = FAMILIES[case[0]]
    source = pipeline.load_model(str(tiny_folders[case[0]]), None, 0, "cpu")
    model = load(written[case], device="cpu")
    name = family.linear_name(1, family.sites[-1].linears[0])
    module = model.get_submodule(name)
    fused = fused_weight(source.model.get_submodule(name), module.transform).float()
    for row in (0, 5, 63):
        for block in range(fused.shape[1] // 32):
            values = fused[row, block * 32 : block * 32 + 32].tolist()
            byte, codes = reference.quantize_block(values, ScaleRule.FLOOR)
            assert byte == module.weight_scale[row, block]
            stored = module.weight_packed[row, block * 16 : block * 16 + 16].tolist()
            assert codes == [code for byte in stored for code in (byte & 15, byte >> 4)]


@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_evaluates_as_the_model_in_the_comparison(
    case: tuple[str, str],
    written: dict[tuple[str, str], Path],
    tiny_folders: dict[str, Path],
    story: Path,
) -> None:
    plan = EvaluationPlan(text=str(story), eval_tokens=512, seqlen=64)
    recipes = [recipe(case[1], story)]
    compared = compare(str(tiny_folders[case[0]]), recipes, plan, device="cpu")
    evaluated = pipeline.evaluate(str(written[case]), plan, device="cpu")
    baseline, row = compared.rows
    assert (baseline.method, baseline.rounding, baseline.scale_rule) == ("bf16", None, None)
    assert (row.method, row.rounding, row.scale_rule, row.seed) == (case[1], "rtn", "floor", 0)
    assert evaluated.rows[0].perplexity == row.perplexity
    assert evaluated.rows[0].method == row.method
    assert evaluated.rows[0].site_error == pytest.approx(row.site_error, rel=1e-12)
    assert row.perplexity != baseline.perplexity


FRESH = """
import sys
import mxtorq
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found[folder] = model(input_ids=torch.arange(40)[None] % 256).logits
save_file(found, sys.argv[1])
"""


def test_transformers_runs_each_of_them_in_a_fresh_process(
    written: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """The logits of `mxtorq.load`, to the bit: the same kernels, the same order of sums. (Those
    without transforms are compressed-tensors', which computes in BF16: see below.)"""
    folders = [str(f) for f in written.values() if not (f / "model.safetensors").exists()]
    assert {Path(f).name.partition("-")[2] for f in folders if "qwen3-" in f} == {
        method.replace(":", "-") for method in METHODS if method not in ("identity", "smoothquant")
    }
    command = [sys.executable, "-c", FRESH, str(tmp_path / "found"), *folders]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = load_file(tmp_path / "found")
    for folder in folders:
        with torch.no_grad():
            expected = load(folder, device="cpu")(input_ids=torch.arange(40)[None] % 256).logits
        assert torch.equal(found[folder], expected)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(
    written: dict[tuple[str, str], Path],
    tiny_folders: dict[str, Path],
    story: Path,
    tmp_path: Path,
) -> None:
    first = written["qwen3", "torq"]
    model = str(tiny_folders["qwen3"])
    pipeline.quantize(model, tmp_path / "again", recipe("torq", story), device="cpu")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    pipeline.quantize(model, tmp_path / "other", recipe("torq", story, seed=1), device="cpu")
    weights = "mxtorq-model.safetensors"
    assert (first / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_the_quantized_layer_feeds_the_next(tiny_folders: dict[str, Path], story: Path) -> None:
    """The second layer's statistics come from a quantized first layer."""
    source = pipeline.load_model(str(tiny_folders["llama"]), None, 0, "cpu")
    settings = recipe("torq", story)
    windows = pipeline.calibrate(source, settings)
    alone = pipeline.load_model(str(tiny_folders["llama"]), None, 0, "cpu")
    quantize_(source, windows.ids, settings, pipeline.silent)
    layers = alone.model.model.layers
    inputs = first_layer_inputs(alone.model, alone.family, windows.ids)
    sites = {alone.family.site_name(1, s): s for s in alone.family.sites}
    quantized_first = source.model.model.layers[0]
    advance_(quantized_first, inputs)
    statistics = capture_sites(layers[1], sites, inputs, settings.seed)
    name = "model.layers.1.qkv_in"
    expected = settings.method.fit(statistics[name], settings.seed).matrix()
    found = source.model.model.layers[1].self_attn.q_proj.transform.matrix()
    assert torch.equal(found, expected)


def test_progress_reaches_its_end(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    calls: list[tuple[str, int, int]] = []
    pipeline.quantize(
        str(tiny_folders["llama"]),
        tmp_path / "out",
        recipe("identity", story),
        device="cpu",
        progress=lambda *step: calls.append(step),
    )
    assert calls == [
        *(("load", done, 2) for done in range(3)),
        *(("preflight", done, 1) for done in range(2)),
        *(("quantize", done, 2) for done in range(3)),
        *(("write", done, 2) for done in range(3)),
    ]


@pytest.mark.parametrize("method", ["torq", "quarot"])
def test_a_tied_head_and_rescaled_positions(method: str, story: Path, tmp_path: Path) -> None:
    """As in Llama 3.2: the head is stored once unless a rotation unties it, and the checkpoint
    turns positions as the source does."""
    model = tiny_models.build("llama", **tiny_models.LLAMA_32)
    plain = tiny_models.build("llama", tie_word_embeddings=True)
    frequencies = model.model.rotary_emb.inv_freq
    assert not torch.equal(frequencies, plain.model.rotary_emb.inv_freq)
    folder, out = tiny_models.save(model, tmp_path / "model"), tmp_path / "out"
    pipeline.quantize(str(folder), out, recipe(method, story), device="cpu")
    stored = read_checkpoint(out)
    assert stored.config["tie_word_embeddings"] == (method == "torq")
    assert ("lm_head.weight" in stored.weights.entries) == (method == "quarot")
    loaded = load(out, device="cpu")
    assert torch.equal(loaded.model.rotary_emb.inv_freq, frequencies)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (method == "torq")


# What is not ours to load, and what is broken.


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_stock_transformers_runs_an_identity_checkpoint(
    family: str, tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """With the rule that compressed-tensors has (even), the stock path computes the same."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    settings = recipe("identity", story, scale_rule=ScaleRule.EVEN)
    pipeline.quantize(str(tiny_folders[family]), out, settings, device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(40)[None] % 256
    with torch.no_grad():
        ours = build_model(read_checkpoint(out), "out", FAMILIES[family])(input_ids=ids).logits
        theirs = stock(input_ids=ids).logits
    # The same operands, exact in bfloat16, through the same matrix product.
    assert torch.equal(ours, theirs)


def test_stock_transformers_does_not_round_what_experts_read(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """It stacks the dequantized weights of experts and runs them as they are (5.23): their inputs
    stay as they come, and all else is as we compute it. Routers are listed as ignored."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    settings = recipe("identity", story, scale_rule=ScaleRule.EVEN)
    pipeline.quantize(str(tiny_folders["qwen3_moe"]), out, settings, device="cpu")
    contents = read_checkpoint(out)
    ignored = contents.config["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    ours = build_model(contents, "out", FAMILIES["qwen3_moe"])
    ids = torch.arange(40)[None] % 256
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out).eval()(input_ids=ids).logits
        assert not torch.equal(ours(input_ids=ids).logits, theirs)
        experts = [n for n, m in ours.named_modules() if isinstance(m, MXFP4Linear) if "exp" in n]
        assert len(experts) == 2 * 4 * 3
        for name in experts:
            weight = dequantize(ours.get_submodule(name).weight_mxfp4, torch.bfloat16)
            linear = torch.nn.Linear(*weight.T.shape, bias=False, dtype=torch.bfloat16)
            linear.weight.copy_(weight)
            ours.set_submodule(name, linear)
        assert torch.equal(ours(input_ids=ids).logits, theirs)


@pytest.fixture
def broken(written: dict[tuple[str, str], Path], tmp_path: Path) -> Path:
    """A private copy of a checkpoint, to be broken."""
    return Path(shutil.copytree(written["llama", "torq"], tmp_path / "broken"))


@pytest.mark.parametrize(
    "name",
    ["mxtorq-model.safetensors", "mxtorq-transforms.safetensors", "config.json", "tokenizer.json"],
)
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_files_are_refused(broken: Path, name: str, damage: str) -> None:
    path = broken / name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=name):
        load(broken, device="cpu")


def forge(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a tensor file and make the manifest agree, as an adversary would."""
    import hashlib

    save_file(tensors, folder / name)
    manifest = json.loads((folder / "mxtorq.json").read_text())
    content = (folder / name).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][name] = {"sha256": digest, "bytes": len(content)}
    (folder / "mxtorq.json").write_text(json.dumps(manifest))


def test_consistent_files_with_wrong_content_are_refused(broken: Path) -> None:
    name = "mxtorq-model.safetensors"
    good = load_file(broken / name)
    linear = "model.layers.0.mlp.up_proj"
    without = {k: v for k, v in good.items() if k != f"{linear}.weight_scale"}
    narrow = {**good, f"{linear}.weight_packed": good[f"{linear}.weight_packed"][:, :-1].clone()}
    missing = {k: v for k, v in good.items() if k != "model.norm.weight"}
    unbiased = {k: v for k, v in good.items() if k != f"{linear}.bias"}
    extra = {**good, "model.other.weight": torch.zeros(3)}
    for tensors, message in (
        (without, "weight_scale"),
        (narrow, "MXFP4 keeps two codes"),
        (missing, r"model\.norm\.weight"),
        (unbiased, r"up_proj\.bias"),
        (extra, r"model\.other"),
    ):
        forge(broken, name, tensors)
        with pytest.raises(CheckpointError, match=message):
            load(broken, device="cpu")


def test_a_configuration_that_builds_no_such_model_is_refused(broken: Path) -> None:
    """Names that the model does not have, with hashes that agree."""
    path = broken / "mxtorq.json"
    for old, new in (("mlp.up_proj", "mlp.sideways_proj"), ('"activations"', '"elsewhere"')):
        honest = path.read_text()
        path.write_text(honest.replace(old, new))
        with pytest.raises(CheckpointError):
            load(broken, device="cpu")
        path.write_text(honest)


def test_a_damaged_transform_is_refused(broken: Path) -> None:
    name = "mxtorq-transforms.safetensors"
    good = load_file(broken / name)
    key = "model.layers.0.qkv_in.intra"
    for tensors in (
        {**good, key: good[key] * 2},
        {k: v for k, v in good.items() if k != "model.layers.0.qkv_in.inter.cos"},
    ):
        forge(broken, name, tensors)
        with pytest.raises(CheckpointError, match=r"model\.layers\.0\.qkv_in"):
            load(broken, device="cpu")


def test_an_unknown_manifest_version_is_refused(broken: Path) -> None:
    path = broken / "mxtorq.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 7'))
    with pytest.raises(CheckpointError, match="version 7"):
        load(broken, device="cpu")


def test_what_is_no_checkpoint(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    for folder in (tmp_path, tmp_path / "none", tiny_folders["llama"]):
        with pytest.raises(CheckpointError, match=r"manifest mxtorq\.json"):
            load(folder, device="cpu")


def test_a_mismatch_after_writing_is_an_error_and_leaves_nothing(
    tiny_folders: dict[str, Path],
    story: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A writer that stores one wrong code is caught by reading back."""
    honest = stored_tensors

    def lying(source: Source, index: int, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        tensors = {k: v.clone() for k, v in honest(source, index, layer).items()}
        tensors[f"model.layers.{index}.mlp.up_proj.weight_packed"][0, 0] ^= 0x07
        return tensors

    monkeypatch.setattr(pipeline, "stored_tensors", lying)
    with pytest.raises(VerificationError, match="numbers behind the last layer differ"):
        pipeline.quantize(
            str(tiny_folders["llama"]), tmp_path / "out", recipe("torq", story), device="cpu"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out.log"]
    assert "VerificationError" in (tmp_path / "out.log").read_text()


def test_errors_come_before_work_and_leave_nothing(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    model = str(tiny_folders["llama"])
    (tmp_path / "there").mkdir()
    short = tmp_path / "short.txt"
    short.write_text("short")
    for out, settings, error in (
        ("there", recipe("torq", story), OutputError),
        ("out", recipe("torq", short), TextError),
        ("out", recipe("torq", story, seqlen=129), UsageError),
        ("out", recipe("torq", story, outliers="none"), UsageError),
        ("out", recipe("torq", tmp_path / "missing"), TextError),
    ):
        with pytest.raises(error):
            pipeline.quantize(model, tmp_path / out, settings, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt", "there"]


def test_activations_that_overflow_name_their_site(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folders["qwen3"], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.down_in"):
        pipeline.quantize(str(folder), tmp_path / "out", recipe("torq", story), device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_under_the_rules_of_engines(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """Each rule once, its own first; calibrated under it where the rounding looks at that."""
    out, model = tmp_path / "out", str(tiny_folders["qwen3"])
    rounding = parse_rounding("gptq")
    asked = recipe("hadamard", story, target=Target.VLLM_BLACKWELL, rounding=rounding)
    manifest = pipeline.quantize(model, out, asked, device="cpu")
    assert manifest.scale_rules == {"weights": "floor", "activations": "rceil"}
    assert {site.kind for site in manifest.sites} == {"engine-matrix"}
    assert not (out / "mxtorq-transforms.safetensors").exists()
    assert not (out / "model.safetensors").exists()
    plan = EvaluationPlan(text=str(story), eval_tokens=512, seqlen=64)
    own, even = pipeline.evaluate(str(out), plan, targets=list(Target), device="cpu").rows
    assert (own.scale_rule, own.activation_rule, own.target) == ("floor", "rceil", "vllm-blackwell")
    assert (even.scale_rule, even.activation_rule) == ("floor", "even")
    assert own.perplexity != even.perplexity
    compared = compare(model, [asked], plan, device="cpu").rows[1]
    assert (compared.perplexity, compared.activation_rule) == (own.perplexity, "rceil")
    with pytest.raises(UsageError, match="is not quantized"):
        pipeline.evaluate(model, plan, targets=[Target.ROCM])


def test_a_target_refuses_before_the_work(
    tiny_folders: dict[str, Path], story: Path, tmp_path: Path
) -> None:
    """The probe of the first layer meets it. The tiny Llama has biases everywhere."""
    for family, method in (("qwen3", "torq"), ("llama", "hadamard")):
        asked = recipe(method, story, target=Target.VLLM_EMULATION)
        model = str(tiny_folders[family])
        with pytest.raises(UsageError, match=r"vllm-emulation for model\.layers\.0\."):
            pipeline.quantize(model, tmp_path / "out", asked, device="cpu", announce=lambda _: None)
        assert not list(tmp_path.iterdir())


def test_outliers_belong_to_quantize_not_to_a_checkpoint(
    written: dict[tuple[str, str], Path], story: Path
) -> None:
    plan = EvaluationPlan(text=str(story), seqlen=64)
    with pytest.raises(UsageError, match="--outliers"):
        pipeline.evaluate(str(written["llama", "torq"]), plan, outliers="qwen3-0.6b")


def test_unfit_sites_stay_in_bfloat16_and_the_manifest_says_so(data: Path, tmp_path: Path) -> None:
    """stories260K: a real trained model whose ffn of 172 cannot hold MX blocks."""
    model = str(data / "models/stories260K")
    text = data / "text/tinystories_5k.jsonl"
    settings = recipe("torq", text, calibration_tokens=1024, seqlen=256)
    with pytest.raises(ModelError, match=r"mlp\.down_proj: 172 input features"):
        pipeline.quantize(model, tmp_path / "out", settings, device="cpu")
    allowed = recipe("torq", text, calibration_tokens=1024, seqlen=256, allow_unfit=True)
    manifest = pipeline.quantize(model, tmp_path / "out", allowed, device="cpu")
    assert manifest.unfit == {f"model.layers.{i}.down_in": 172 for i in range(5)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model.layers.0.mlp.down_proj" in config["quantization_config"]["ignore"]
    loaded = load(tmp_path / "out", device="cpu")
    assert type(loaded.get_submodule("model.layers.0.mlp.down_proj")) is torch.nn.Linear


def test_a_real_trained_model_end_to_end(data: Path, tmp_path: Path) -> None:
    """babyllama-tok361 on TinyStories: BF16 near its known perplexity, and quantized ones above."""
    model = str(data / "models/babyllama-tok361")
    text = data / "text/tinystories_5k.jsonl"
    plan = EvaluationPlan(text=str(text), eval_tokens=8192)
    recipes = [
        recipe(m, text, calibration_tokens=4096, seqlen=256) for m in ("identity", "hadamard")
    ]
    baseline, identity, hadamard = compare(model, recipes, plan, device="cpu").rows
    assert 1.85 < baseline.perplexity < 2.2
    assert baseline.perplexity < hadamard.perplexity < 4
    assert baseline.perplexity < identity.perplexity < 4
    saturating = recipe(
        "identity", text, calibration_tokens=4096, seqlen=256, scale_rule=ScaleRule.FLOOR6
    )
    collapsed = compare(model, [saturating], plan, device="cpu").rows[1]
    assert collapsed.perplexity > 2 * identity.perplexity
