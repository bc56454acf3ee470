"""A checkpoint's manifest in vLLM's terms.

vLLM fuses linears that read one input: ``self_attn.qkv_proj`` stands for the q_proj, k_proj and
v_proj that the manifest names. A site of ours is just such a group, so a fused linear has one site
or none, and anything between is an error.

Before anything is built, every file of a local folder is checked against the manifest's hash, once,
in the process that reads the configuration (a gigabyte takes about a second, and is in memory then
for the loader). Of a hub id only what the plugin itself reads is fetched and checked here; the
weights come through vLLM and the hub's own hashes.
"""

from dataclasses import dataclass
from pathlib import Path

from mxtorq.errors import CheckpointError, MxtorqError, UsageError
from mxtorq.export.carried import carried_transform, is_carried, own_transform
from mxtorq.export.checkpoint import TRANSFORMS, read_manifest
from mxtorq.export.compressed_tensors import OWN, WEIGHTS_FILE
from mxtorq.export.manifest import FILE, LONGEST, Manifest, SiteEntry
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.reading.documents import Refusal, read_text
from mxtorq.reading.shards import open_file, open_shards
from mxtorq.transforms.base import Transform
from mxtorq.writing import fingerprint


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What the plugin knows of a checkpoint. It is sent from process to process."""

    folder: Path
    manifest: Manifest

    @property
    def rule(self) -> ScaleRule:
        """The scale rule of activations."""
        return ScaleRule(self.manifest.scale_rules["activations"])

    def site_of(self, linears: list[str]) -> SiteEntry | None:
        """The site whose linears a fused linear consists of; None if they are not quantized.

        Raises:
            CheckpointError: some are of a site and some are not, or they are of several.
        """
        found = {linear: self._site(linear) for linear in linears}
        first = found[linears[0]]
        if any(entry is not first for entry in found.values()):
            sites = {name: entry.site if entry else "none" for name, entry in found.items()}
            raise CheckpointError(
                asked=f"one linear out of {', '.join(linears)}",
                found=", ".join(f"{name} of the site {site}" for name, site in sites.items()),
                why="vLLM fuses these into one product, with one input and one kind of weights",
                todo="quantize again with a family whose sites are the linears that share an input",
            )
        return first

    def transform_of(self, entry: SiteEntry) -> Transform:
        """The transform of a site. Raises `CheckpointError` if it is damaged."""
        refuse = _refuse(self.folder)
        if is_carried(entry):
            file = WEIGHTS_FILE[OWN].removesuffix(".safetensors")
            return carried_transform(entry, open_shards(self.folder, refuse, file))
        there = TRANSFORMS in self.manifest.files
        return own_transform(entry, open_file(self.folder / TRANSFORMS, refuse) if there else None)

    def _site(self, linear: str) -> SiteEntry | None:
        return next((e for e in self.manifest.sites if linear in e.linears), None)


def unfused(prefix: str, fused: dict[str, list[str]]) -> list[str]:
    """The linears that a linear of vLLM consists of, by full name.

    Args:
        prefix: vLLM's full name of it.
        fused: the last names of what a fused linear consists of, by its last name.
    """
    parent, _, last = prefix.rpartition(".")
    start = f"{parent}." if parent else ""
    return [f"{start}{part}" for part in fused.get(last, [last])]


def find_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """The checked checkpoint in a folder, or of a hub id.

    Raises:
        CheckpointError: it has no manifest, or a file is not what the manifest says.
    """
    folder = folder_of(model, revision)
    if Path(model).is_dir():
        return Checkpoint(folder=folder, manifest=read_manifest(folder))
    manifest = read_description(folder)
    expected = manifest.files.get(TRANSFORMS)
    if expected is not None and fingerprint(folder / TRANSFORMS) != expected:
        raise _refuse(folder)(f"{TRANSFORMS}, which is not the file that the manifest describes")
    return Checkpoint(folder=folder, manifest=manifest)


def folder_of(model: str, revision: str | None = None) -> Path:
    """A local folder, or the hub's cached one with the manifest and the transforms in it.

    Raises:
        CheckpointError: the hub does not answer.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[FILE, TRANSFORMS]))
    except Exception as error:  # requests, the hub and the file system share no root
        raise _refuse(Path(model))(f"{type(error).__name__}: {error}") from error


def read_description(folder: Path) -> Manifest:
    """The manifest alone, without looking at the files that it names.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    text = read_text(folder / FILE, LONGEST, _refuse(folder))
    return Manifest.from_json(text, str(folder / FILE))


def require_whole_blocks(prefix: str, width: int, block: int, ranks: int) -> None:
    """Refuse to cut MX blocks.

    Raises:
        UsageError: a rank would get a part of one.
    """
    if width % block:
        raise UsageError(
            asked=f"{prefix} split over {ranks} ranks of tensor parallelism",
            found=f"{width} input channels a rank",
            why=f"MXFP4 shares a scale among {block} channels, so a rank needs whole blocks",
            todo=f"choose a --tensor-parallel-size that divides {width * ranks // block}",
        )


def no_experts(prefix: str) -> MxtorqError:
    """The error for a layer of experts, which this plugin does not run."""
    return UsageError(
        asked=f"the experts {prefix} in vLLM",
        found="MXFP4 experts of an mxtorq checkpoint",
        why="the plugin computes linears; vLLM stacks experts and routes tokens in kernels of "
        "its own, which know no MXFP4 activations and no transforms here",
        todo="evaluate or run this checkpoint with mxtorq.load, or serve a dense model",
    )


def _refuse(folder: Path) -> Refusal:
    return Refusal(
        kind=CheckpointError,
        asked=f"the checkpoint {folder} in vLLM",
        why="the plugin runs what `mxtorq quantize` wrote, by its manifest and its transforms",
        todo="name the whole folder that `mxtorq quantize` wrote",
    )
