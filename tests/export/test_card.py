"""The card says what the manifest says, in a form that people and the hub read."""

from dataclasses import replace
from typing import Any

import pytest

from mxtorq.export.card import WORST, Papers, card
from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.reading.front_matter import front_matter


def site(number: int, kind: str = "torq", **changes: Any) -> SiteEntry:
    values = {
        "site": f"model.layers.{number}.down_in",
        "linears": [f"model.layers.{number}.mlp.down_proj"],
        "width": 96,
        "kind": kind,
        "multiply_adds": 1000,
        "extra_bytes": 500,
        "output_error": 0.01 * number,
        **changes,
    }
    return SiteEntry(**values)


def manifest(kind: str = "torq", **changes: Any) -> Manifest:
    values = {
        "method": "torq:levels=inter",
        "rounding": "gptq:order=backward",
        "recipe": {"method": {}, "rounding": {}, "calibration": "/home/me/notes.jsonl"},
        "scale_rules": {"weights": "floor", "activations": "floor"},
        "seed": 7,
        "source": {
            "model": "/home/me/my-llama",
            "family": "llama",
            "baseline_dtype": "bfloat16",
            "outliers": None,
        },
        "calibration": {
            "source": "/home/me/notes.jsonl",
            "tokens": 16384,
            "seqlen": 2048,
            "seed": 7,
            "text_sha256": "ab",
        },
        "versions": {"mxtorq": "0.1.0", "torch": "2.13.0"},
        "sites": [site(number, kind) for number in range(7)],
        "unfit": {},
        "files": {},
        **changes,
    }
    return Manifest(**values)


def test_the_recipe_and_the_errors_are_there() -> None:
    text = card(manifest(), Papers())
    assert "# my-llama in MXFP4 (W4A4)" in text
    for said in (
        "`torq:levels=inter`",
        "`gptq:order=backward`",
        "16,384 tokens of `notes.jsonl` in windows of 2,048, seed 7",
        "mxtorq 0.1.0, torch 2.13.0",
        "**3.000e-02** on average",
        "7,000 multiply-adds a token, 3,500 bytes",
        "inputs of 7 linears",
        "mxtorq evaluate",
    ):
        assert said in text, said
    for rule in ("scale rule of weights", "scale rule of activations"):
        assert f"| {rule} | `floor`, {ScaleRule.FLOOR.card.formula} |" in text
    listed = [line for line in text.splitlines() if line.startswith("| model.layers")]
    assert listed == [
        f"| model.layers.{n}.down_in | torq | {0.01 * n:.3e} |" for n in range(6, 6 - WORST, -1)
    ]


def test_no_path_is_in_it() -> None:
    text = card(manifest(), Papers(files={"LICENSE": b""}))
    assert "/home" not in text
    assert card(manifest(), Papers()) == card(manifest(), Papers())


def test_the_hub_can_read_it() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    papers = Papers(
        hub_name="meta-llama/Llama-3.1-8B",
        license="other",
        license_name="llama3.1",
        license_link="https://example.org/LICENSE",
        files={"LICENSE": b"", "USE_POLICY.md": b""},
    )
    text = card(manifest(source={**manifest().source, "model": "meta-llama/Llama-3.1-8B"}), papers)
    _, head, rest = text.split("---\n", 2)
    content = yaml.safe_load(head)
    assert content == {
        "license": "other",
        "license_name": "llama3.1",
        "license_link": "https://example.org/LICENSE",
        "base_model": ["meta-llama/Llama-3.1-8B"],
        "base_model_relation": "quantized",
        "library_name": "mxtorq",
        "pipeline_tag": "text-generation",
        "quantized_by": "mxtorq",
        "tags": ["mxfp4", "w4a4", "mxtorq", "torq"],
    }
    assert front_matter(text) == {k: v if isinstance(v, list) else [v] for k, v in content.items()}
    assert "# Llama-3.1-8B in MXFP4" in rest
    assert "(https://huggingface.co/meta-llama/Llama-3.1-8B)" in rest
    assert "other (llama3.1). Copied from there: [LICENSE](LICENSE), [USE_POLICY.md]" in rest


def test_a_licence_that_is_not_known_is_not_guessed() -> None:
    text = card(manifest(), Papers(base_models=("Qwen/Qwen3-0.6B",)))
    said = front_matter(text)
    assert "license" not in said
    assert said["base_model"] == ["Qwen/Qwen3-0.6B"]
    assert "see the source model" in text


def test_a_rotated_checkpoint_needs_the_import() -> None:
    text = card(manifest(), Papers())
    assert "import mxtorq  #" in text
    assert "stops with an error that model.safetensors is missing" in text
    assert "even" not in text.split("## Load it")[1]
    assert front_matter(text)["library_name"] == ["mxtorq"]


def test_a_plain_checkpoint_is_rounded_by_even_elsewhere() -> None:
    text = card(manifest("identity"), Papers())
    assert "import mxtorq  #" not in text
    assert "chooses them by `even`, not by `floor`" in text
    assert "experts" not in text
    assert front_matter(text)["library_name"] == ["transformers"]
    assert "compressed-tensors" in front_matter(text)["tags"]
    same = manifest("identity", scale_rules={"weights": "rceil", "activations": "even"})
    assert "which is the rule of this checkpoint too" in card(same, Papers())


def test_experts_are_mentioned_where_they_matter() -> None:
    counts = {"count": 4, "pooled": 0, "unseen": 0}
    text = card(manifest(sites=[site(1, "identity", experts=counts)]), Papers())
    assert "What experts read is not rounded there" in text
    assert "some experts" not in text
    text = card(manifest(sites=[site(1, experts={**counts, "pooled": 2})]), Papers())
    assert "At 1 inputs some experts saw fewer calibration tokens" in text


def test_what_was_chosen_is_counted() -> None:
    def choice(name: str) -> dict[str, Any]:
        return {"candidate": name, "losses": {name: 0.5}, "at_least": {}}

    names = ["layer-128", "wush", "layer-128", "x`|<b>"]
    sites = [site(number, choice=choice(name)) for number, name in enumerate(names)]
    text = card(manifest(sites=sites), Papers())
    assert "Taken: layer-128 at 2 of 4 sites, wush at 1, x???b? at 1." in text
    assert "Taken" not in card(manifest(), Papers())


def test_unfit_sites_outliers_and_own_families() -> None:
    source = {**manifest().source, "outliers": "qwen3-0.6b", "family": "mine"}
    text = card(manifest(unfit={"model.layers.0.down_in": 172}, source=source), Papers())
    assert "no multiple of 32: model.layers.0.down_in (172)" in text
    assert "rescaled to the profile `qwen3-0.6b`" in text
    assert 'mxtorq.load("THIS_FOLDER", family=...)' in text
    assert "AutoModelForCausalLM" not in text


def test_foreign_names_stay_names() -> None:
    nasty = "x`|\n\n<script>alert(1)</script>[a](b)"
    changed = replace(
        manifest(),
        method=nasty,
        sites=[site(1, site=nasty)],
        source={**manifest().source, "model": f"/home/{nasty}", "outliers": nasty},
        calibration={**manifest().calibration, "source": nasty},
    )
    text = card(changed, Papers())
    for piece in ("<script", "[a](b)", "x`", "x|"):
        assert piece not in text
    assert "\n\n?" not in text
