"""The model card: README.md of a checkpoint, for people and for the hub.

A function of the manifest and of what the source model says of itself, so that the same run gives
the same bytes: no time of day, no path (a folder or a file is called by its last name). It says how
the checkpoint was made, what was measured while it was, how each engine loads it, and what engines
do that drop a part of it. Perplexity is measured later, by others too, and is not in it.

The licence is passed on and never guessed: where the source does not name one in a form that is
understood, the front matter has none.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from mxtorq.export.carried import is_carried
from mxtorq.export.compressed_tensors import OWN, STOCK, WEIGHTS_FILE
from mxtorq.export.manifest import FILE, Manifest, SiteEntry
from mxtorq.export.targets import Target
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.models import FAMILIES
from mxtorq.reports.choices import brief, candidates_of

CARD = "README.md"
WORST = 5
"""How many sites a card lists."""


@dataclass(frozen=True, kw_only=True)
class Papers:
    """What is known of the origin and the licence of a source model."""

    hub_name: str | None = None
    """Its name on the hub, if it came from there."""
    base_models: tuple[str, ...] = ()
    """What it, in a folder, says that it was made from."""
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Its licence files, copied into the checkpoint."""


def card(manifest: Manifest, papers: Papers) -> str:
    """The text of README.md for a checkpoint."""
    rotated = [entry for entry in manifest.sites if entry.kind != "identity"]
    parts = [
        *_front_matter(manifest, papers, bool(rotated), all(map(is_carried, rotated))),
        *_what(manifest, papers, bool(rotated)),
        *_recipe(manifest),
        *_results(manifest),
        *_loading(manifest, rotated),
        *_licence(papers),
        f"[{FILE}]({FILE}) names all files of this folder with their hashes, this one included. "
        "mxtorq does not load a folder in which one was changed.",
    ]
    return "\n".join(parts) + "\n"


def _front_matter(manifest: Manifest, papers: Papers, rotated: bool, stock: bool) -> list[str]:
    bases = [papers.hub_name] if papers.hub_name else list(papers.base_models)
    method = re.sub(r"[^a-z0-9+]", "-", manifest.method.partition(":")[0].lower())
    entries = {
        "license": papers.license,
        "license_name": papers.license_name,
        "license_link": papers.license_link,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items() if value]
    if bases:
        lines += ["base_model:", *(f"- {json.dumps(base)}" for base in bases)]
        lines += ["base_model_relation: quantized"]
    tags = ["mxfp4", "w4a4", OWN, *([STOCK] if stock else []), method]
    lines += [
        f"library_name: {OWN if rotated else 'transformers'}",
        "pipeline_tag: text-generation",
        "quantized_by: mxtorq",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    return ["---", *lines, "---", ""]


def _what(manifest: Manifest, papers: Papers, rotated: bool) -> list[str]:
    name = _last_name(str(manifest.source["model"]))
    link = f"[{papers.hub_name}](https://huggingface.co/{papers.hub_name})"
    linears = sum(len(entry.linears) for entry in manifest.sites)
    text = (
        f"{link if papers.hub_name else f'`{name}`'}, quantized by mxtorq "
        f"{manifest.versions.get('mxtorq', '')} to MXFP4 (OCP Microscaling: blocks of 32 E2M1 "
        f"numbers that share a power of two): the weights *and* the inputs of {linears:,} linears. "
        "Everything else is in BF16."
    )
    if rotated:
        text += (
            f" The {len(manifest.sites):,} inputs that these linears share are transformed before "
            "they are rounded, while the model runs: "
            f"{manifest.multiply_adds_per_token:,} multiply-adds a token, "
            f"{manifest.extra_bytes:,} bytes. Without these transforms the weights mean nothing."
        )
    return [f"# {name} in MXFP4 (W4A4)", "", text, ""]


def _recipe(manifest: Manifest) -> list[str]:
    data = manifest.calibration
    calibration = (
        f"{data['tokens']:,} tokens of `{_last_name(str(data['source']))}` in windows of "
        f"{data['seqlen']:,}, seed {data['seed']}"
    )
    rows = {
        "transform": f"`{_shown(manifest.method)}`",
        "rounding": f"`{_shown(manifest.rounding)}`",
        "scale rule of weights": _rule(manifest.scale_rules["weights"]),
        "scale rule of activations": _rule(manifest.scale_rules["activations"]),
        "calibration": calibration,
        "seed": str(manifest.seed),
        "versions": ", ".join(f"{name} {value}" for name, value in manifest.versions.items()),
    }
    if manifest.source.get("outliers") is not None:
        rows["outliers"] = (
            f"channels rescaled to the profile `{_shown(str(manifest.source['outliers']))}` "
            "before quantization, which keeps the function"
        )
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return ["## Recipe", "", "| | |", "| --- | --- |", *lines, "", *_choices(manifest)]


def _choices(manifest: Manifest) -> list[str]:
    chosen = candidates_of(manifest.sites)
    if not chosen:
        return []
    text = (
        "At each input several transforms were compared on held-out calibration tokens. Taken: "
        f"{_shown(brief(chosen), 2000)}. [{FILE}]({FILE}) has what each of them lost."
    )
    return [text, ""]


def _results(manifest: Manifest) -> list[str]:
    worst = sorted(manifest.sites, key=lambda entry: (-entry.output_error, entry.site))[:WORST]
    lines = [
        "## Results",
        "",
        "Error of the linears' outputs on calibration tokens, sum ||y - y_q||² / sum ||y||², W4A4 "
        "against the unquantized linears on the same inputs: "
        f"**{manifest.mean_output_error:.3e}** on average. The worst inputs:",
        "",
        "| input | transform | error |",
        "| --- | --- | --- |",
        *(f"| {_shown(entry.site)} | {entry.kind} | {entry.output_error:.3e} |" for entry in worst),
        "",
    ]
    pooled = [entry for entry in manifest.sites if _pooled(entry)]
    if pooled:
        lines += [
            f"At {len(pooled):,} inputs some experts saw fewer calibration tokens than the input "
            f"is wide ([{FILE}]({FILE}) counts them). A rounding that looks at inputs looked at "
            "those of all experts instead.",
            "",
        ]
    if manifest.unfit:
        names = ", ".join(f"{_shown(name)} ({width})" for name, width in manifest.unfit.items())
        lines += [f"In BF16, since their width is no multiple of 32: {names}.", ""]
    return [
        *lines,
        "When it was written, the checkpoint was read back from the disk and run, and compared bit "
        "for bit with the quantized model in memory. Perplexity is not measured by quantizing:",
        "",
        "```",
        "mxtorq evaluate THIS_FOLDER --text wikitext2:wiki.test.raw",
        "```",
        "",
    ]


def _loading(manifest: Manifest, rotated: list[SiteEntry]) -> list[str]:
    family = str(manifest.source["family"])
    own = family not in FAMILIES
    lines = [
        "## Load it",
        "",
        "With mxtorq, on any device (it computes in float32 on a CPU):",
        "",
        "```python",
        "import mxtorq",
        "",
        f'model = mxtorq.load("THIS_FOLDER"{", family=..." if own else ""})',
        "```",
        "",
    ]
    if own:
        lines += [
            f"`{_shown(family)}` is no family of mxtorq's: pass the object that describes it.",
            "",
        ]
    if own and rotated:
        return [*lines, "Other engines cannot load it, since they cannot be given a family.", ""]
    if rotated and all(map(is_carried, rotated)):
        return [*lines, *_load_carried(manifest), *_LOAD_WITH_TRANSFORMERS]
    if rotated:
        return [*lines, *_LOAD_WITH_TRANSFORMERS, *_LOAD_WITH_PLUGIN]
    return [*lines, *_load_plain(manifest)]


_LOAD_WITH_TRANSFORMERS = [
    "With transformers, from a folder or from the hub:",
    "",
    "```python",
    "import mxtorq  # transformers learns of the transforms by this line",
    "from transformers import AutoModelForCausalLM",
    "",
    'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
    "```",
    "",
    "It computes in bfloat16 unless `dtype=` says otherwise. "
    f"Without the first line it stops with an error that {WEIGHTS_FILE[STOCK]} is missing. The "
    f"tensors are in {WEIGHTS_FILE[OWN]} on purpose: run without the transforms, the model "
    "would speak nonsense.",
    "",
]

_LOAD_WITH_PLUGIN = [
    "With vLLM, where mxtorq is installed beside it (its plugin is found by itself):",
    "",
    "```",
    "vllm serve THIS_FOLDER",
    "```",
    "",
    f"Without the plugin vLLM refuses the quantization method `{OWN}`.",
    "",
]


def _load_carried(manifest: Manifest) -> list[str]:
    target = Target(manifest.recipe.get("target", Target.MXTORQ))
    return [
        f"With vLLM, as its target `{target.value}` computes; mxtorq is not needed there:",
        "",
        "```",
        "vllm serve THIS_FOLDER",
        "```",
        "",
        "The transforms stand in `transform_config`, which vLLM runs, without tensor parallelism. "
        f"{target.card.why[0].upper()}{target.card.why[1:]}. On other devices activations are "
        "rounded by another rule, or not at all. Where mxtorq is installed, `--quantization "
        f"{OWN}` computes the same on any device, with tensor parallelism.",
        "",
    ]


def _load_plain(manifest: Manifest) -> list[str]:
    rule = manifest.scale_rules["activations"]
    if rule == ScaleRule.EVEN:
        meant = "which is the rule of this checkpoint too."
    else:
        meant = (
            f"not by `{rule}`, which is what the errors above are of and what mxtorq computes. "
            "Numbers from there are near to those, and others."
        )
    lines = [
        "With stock transformers and compressed-tensors; mxtorq is not needed:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        "The scales of weights are stored. Those of activations are chosen while the model runs, "
        f"and compressed-tensors chooses them by `even`, {meant}",
    ]
    if any(entry.experts for entry in manifest.sites):
        lines[-1] += (
            " What experts read is not rounded there at all (transformers 5.23): "
            "they run with 4-bit weights and 16-bit inputs."
        )
    return [
        *lines,
        "",
        "With vLLM, where mxtorq is installed beside it (its plugin is found by itself):",
        "",
        "```",
        "vllm serve THIS_FOLDER",
        "```",
        "",
        "Without the plugin vLLM takes it as a compressed-tensors checkpoint. By which rule "
        "activations are rounded, and whether they are, then depends on the device.",
        "",
    ]


def _licence(papers: Papers) -> list[str]:
    where = "the source model"
    if papers.hub_name:
        where = f"[the source model](https://huggingface.co/{papers.hub_name})"
    text = f"That of {where}"
    if papers.license is None:
        text += f", which did not say it in a form that mxtorq understands: see {where}."
    else:
        text += f": {papers.license}"
        text += f" ({papers.license_name})." if papers.license_name else "."
    if papers.files:
        files = ", ".join(f"[{_shown(name)}]({name})" for name in sorted(papers.files))
        text += f" Copied from there: {files}."
    return ["## Licence", "", text, ""]


def _rule(name: str) -> str:
    return f"`{name}`, {ScaleRule(name).card.formula.replace('|', '/')}"


def _pooled(entry: SiteEntry) -> bool:
    return bool(entry.experts and entry.experts["pooled"])


def _last_name(name: str) -> str:
    """What a folder, a file or a hub id is called, without where it is."""
    return _shown(PurePath(name).name or name)


def _shown(text: str, most: int = 200) -> str:
    """A foreign text that neither ends a line, a cell or a quotation, nor is one of HTML."""
    return re.sub(r"[^\w .:,;=+/()@~-]", "?", text)[:most]
