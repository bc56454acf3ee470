"""A checkpoint of any layout that is known here, as one table of quantized linears.

Three layouts keep the same two tensors for a linear: ``weight_packed`` [d_out, d/2] and
``weight_scale`` [d_out, d/32] in compressed-tensors' and mxtorq's, ``weight`` and ``weight_scale``
in Quark's. What differs is where a transform stands: mxtorq's lists one for each site in its
manifest, compressed-tensors keeps matrices beside the linears under names that its
``transform_config`` gives them, times the root of their size.

Only headers are read here. Nothing is refused that a check can say more about.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxtorq.errors import CheckpointError
from mxtorq.export.checkpoint import CONFIG, TRANSFORMS, is_checkpoint
from mxtorq.export.compressed_tensors import OWN, STOCK, WEIGHTS_FILE, weights_file
from mxtorq.export.manifest import FILE, LONGEST, Manifest
from mxtorq.export.packed import QUARK
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.reading.configuration import read_configuration
from mxtorq.reading.documents import Refusal, read_text
from mxtorq.reading.headers import Entry
from mxtorq.reading.shards import Shards, open_file, open_shards

_PACKED = {STOCK: "weight_packed", OWN: "weight_packed", QUARK: "weight"}


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """Two tensors of a linear."""

    packed: str
    """The full name of its codes."""
    scale: str | None
    """That of its scales; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class TransformGroup:
    """A group of compressed-tensors' ``transform_config`` that acts on inputs online."""

    name: str
    kind: str
    size: int | None
    linears: tuple[str, ...]
    """Those that it targets, by full name."""
    matrix: str | None
    """The full name of the stored matrix; None where it is missing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is examined."""

    folder: Path
    method: str
    """``quant_method``."""
    config: dict[str, Any]
    manifest: Manifest | None
    tensors: Shards
    transforms: Shards | None
    """Those of mxtorq's own sites."""
    linears: Mapping[str, QuantizedLinear]
    """By full name."""
    groups: tuple[TransformGroup, ...]

    @property
    def described(self) -> dict[str, Any]:
        """The ``quantization_config``."""
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    def entry(self, name: str) -> Entry:
        """The header of a tensor."""
        return self.tensors.entry(name)

    @property
    def hidden(self) -> bool:
        """Whether the tensors stand under a name that stock transformers does not look for."""
        return weights_file(self.described) != WEIGHTS_FILE[STOCK]

    @property
    def weights_only(self) -> bool:
        """Whether the configuration says that inputs are not rounded (W4A16)."""
        if self.method == QUARK:
            layer = self.described.get("global_quant_config")
            return isinstance(layer, dict) and layer.get("input_tensors") is None
        groups = self.described.get("config_groups")
        listed = list(groups.values()) if isinstance(groups, dict) else []
        inputs = [each.get("input_activations") for each in listed if isinstance(each, dict)]
        return bool(inputs) and all(each is None for each in inputs)

    @property
    def input_rule(self) -> ScaleRule:
        """How inputs are rounded: as the manifest says, or by the rule of those who write none."""
        if self.manifest is None:
            return ScaleRule.EVEN  # compressed-tensors' and Quark's
        return ScaleRule(self.manifest.scale_rules["activations"])

    @property
    def rotated(self) -> bool:
        """Whether anything has to run online."""
        ours = self.manifest is not None and any(s.kind != "identity" for s in self.manifest.sites)
        return ours or bool(self.groups)


def open_subject(folder: Path) -> Subject:
    """Find out what a folder is.

    Raises:
        CheckpointError: no layout that is known here, or files that cannot be read at all.
    """
    refuse = Refusal(
        kind=CheckpointError,
        asked=f"an examination of {folder}",
        why="it cannot be read as an MXFP4 checkpoint",
        todo="name a folder with config.json and safetensors files, as mxtorq, compressed-tensors "
        "(llm-compressor) or Quark write it",
    )
    config = read_configuration(folder / CONFIG, refuse)
    described = config.get("quantization_config")
    method = described.get("quant_method") if isinstance(described, dict) else None
    if not isinstance(method, str) or method not in _PACKED:
        raise refuse(f"quant_method = {method!r:.200}", f"it is none of {', '.join(_PACKED)}")
    manifest = None
    if is_checkpoint(folder):
        text = read_text(folder / FILE, LONGEST, refuse)
        manifest = Manifest.from_json(text, str(folder / FILE))
    described = described or {}
    tensors = open_shards(folder, refuse, weights_file(described).removesuffix(".safetensors"))
    own = folder / TRANSFORMS
    linears = _linears(tensors, _PACKED[method])
    return Subject(
        folder=folder,
        method=method,
        config=config,
        manifest=manifest,
        tensors=tensors,
        transforms=open_file(own, refuse) if own.is_file() else None,
        linears=linears,
        groups=_groups(described, tensors, list(linears)),
    )


def _linears(tensors: Shards, packed: str) -> dict[str, QuantizedLinear]:
    found = {}
    for name in tensors.names:
        path, _, leaf = name.rpartition(".")
        scale = f"{path}.weight_scale"
        there = scale in tensors.entries
        if leaf == packed and (there or packed != "weight"):
            found[path] = QuantizedLinear(packed=name, scale=scale if there else None)
    return found


def _groups(
    described: Mapping[str, Any], tensors: Shards, linears: list[str]
) -> tuple[TransformGroup, ...]:
    config = described.get("transform_config")
    listed = config.get("config_groups") if isinstance(config, dict) else None
    groups = []
    for name, group in listed.items() if isinstance(listed, dict) else ():
        for act in group.get("apply") or () if isinstance(group, dict) else ():
            if not isinstance(act, dict) or act.get("location") != "input":
                continue
            targeted = tuple(n for n in linears if _is_target(n, act))
            stored = [f"{linear}.{name}_input.weight" for linear in targeted]
            groups.append(
                TransformGroup(
                    name=str(name),
                    kind=str(group.get("type")),
                    size=group.get("head_dim") if isinstance(group.get("head_dim"), int) else None,
                    linears=targeted,
                    matrix=next((each for each in stored if each in tensors.entries), None),
                )
            )
    return tuple(groups)


def _is_target(linear: str, act: Mapping[str, Any]) -> bool:
    return _matches(linear, act.get("targets")) and not _matches(linear, act.get("ignore"))


def _matches(linear: str, patterns: Any) -> bool:
    """compressed-tensors' rule: ``re:`` matches from the beginning, else the name or its class."""
    for pattern in patterns if isinstance(patterns, list) else ():
        if not isinstance(pattern, str) or len(pattern) > 1000:
            continue
        if pattern.startswith("re:"):
            try:
                if re.match(pattern[3:], linear):
                    return True
            except re.error:
                continue
        elif pattern in ("Linear", linear) or linear.endswith(f".{pattern}"):
            return True
    return False
