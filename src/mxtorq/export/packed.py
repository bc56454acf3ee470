"""A folder with an MXFP4 model, whoever wrote it, as codes and scales by name: where exports start.

    layout               tensors of a linear P              who says what the inputs are
    mxtorq               P.weight_packed, P.weight_scale    the manifest, and transforms
    compressed-tensors   the same                           config_groups.*.input_activations
    quark                P.weight (uint8), P.weight_scale   global_quant_config.input_tensors

All three pack the even element into the low nibble and store biased E8M0 bytes, so going from one
to another renames tensors and changes no byte. Nothing is read but headers until a tensor is asked
for, so a model may be larger than memory.

A folder that says more than that (another format in some layers, a transform, an algorithm that
runs online, scales of a second level, a quantized cache) is refused here, once for all exports:
what would be left out changes the function. Sources: compressed-tensors 0.20, amd-quark 0.13.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mxtorq.errors import CheckpointError
from mxtorq.export.carried import carried_names, stored_transform
from mxtorq.export.checkpoint import CONFIG, is_checkpoint, read_checkpoint
from mxtorq.export.compressed_tensors import FORMAT, STOCK
from mxtorq.export.manifest import Manifest, SiteEntry
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.spec import BLOCK
from mxtorq.reading.configuration import read_configuration, require_plausible
from mxtorq.reading.documents import Refusal
from mxtorq.reading.shards import Shards, open_shards
from mxtorq.transforms.base import Transform

QUARK = "quark"
HEAD = "lm_head"

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_LAYER = re.compile(r"(.*\.layers\.\d+)\.")
_QUARK_RULES = {"floor": ScaleRule.FLOOR, "even": ScaleRule.EVEN, "ceil": ScaleRule.CEIL}


class Group(NamedTuple):
    """What is written together: a decoder layer, or one tensor outside of the layers."""

    linears: list[str]
    plain: list[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """An MXFP4 model at rest. Made by `read_packed`."""

    folder: Path
    config: dict[str, Any]
    """Of the model, without ``quantization_config``."""
    shards: Shards
    linears: Mapping[str, tuple[str, str]]
    """The names of each quantized linear's codes and scales."""
    plain: list[str]
    """All other tensors."""
    unquantized: list[str]
    """The linears that stay as they are, by full name."""
    input_rule: ScaleRule | None
    """How inputs are rounded to MXFP4; None where they are not (W4A16)."""
    records_rule: bool = True
    """Whether the folder says so; compressed-tensors does not, and its own rule is taken."""
    manifest: Manifest | None = None
    """Of a checkpoint of ours."""
    transforms: Shards | None = None

    @property
    def online(self) -> list[SiteEntry]:
        """The sites whose inputs must be transformed while the model runs."""
        sites = self.manifest.sites if self.manifest else []
        return [entry for entry in sites if entry.kind != "identity"]

    def codes(self, linear: str) -> MXFP4:
        """The stored bytes of a linear. Raises `CheckpointError`."""
        packed, scales = self.linears[linear]
        return MXFP4(self.shards.tensor(packed), self.shards.tensor(scales))

    def transform(self, entry: SiteEntry) -> Transform:
        """The transform of a site. Raises `CheckpointError`."""
        return stored_transform(entry, self.shards, self.transforms)

    def groups(self) -> Iterator[Group]:
        """All tensors, layer by layer, then those outside of the layers one by one."""
        found: dict[str, Group] = {}
        for name in sorted([*self.linears, *self.plain]):
            layer = _LAYER.match(name)
            group = found.setdefault(layer[1] if layer else name, Group([], []))
            (group.linears if name in self.linears else group.plain).append(name)
        yield from found.values()


def read_packed(folder: Path) -> Packed:
    """A checkpoint of ours, a compressed-tensors folder, or a Quark folder; all headers checked.

    Raises:
        CheckpointError: it is none of them, is damaged, or holds what exports would lose.
    """
    if is_checkpoint(folder):
        contents = read_checkpoint(folder)
        config = dict(contents.config)
        described = config.pop("quantization_config")
        linears, plain = _of_packed(contents.weights)
        matrices = carried_names(contents.manifest.sites)
        return Packed(
            folder=folder,
            config=config,
            shards=contents.weights,
            linears=linears,
            plain=[name for name in plain if name not in matrices],
            unquantized=list(described["ignore"]),
            input_rule=ScaleRule(contents.manifest.scale_rules["activations"]),
            manifest=contents.manifest,
            transforms=contents.transforms,
        )
    refuse = Refusal(
        kind=CheckpointError,
        asked=f"the MXFP4 model in {folder}",
        why="exports start from a checkpoint of mxtorq, from compressed-tensors "
        f"{FORMAT!r}, or from Quark's MXFP4",
        todo="name the folder that `mxtorq quantize` wrote, or one of these",
    )
    config = read_configuration(folder / CONFIG, refuse)
    described = config.pop("quantization_config", None) or {}
    shards = open_shards(folder, refuse)
    require_plausible(config, len(shards.names), shards.total_bytes, refuse)
    method = described.get("quant_method")
    if method == STOCK:
        rule = _compressed_tensors_rule(described, refuse)
        linears, plain = _of_packed(shards)
    elif method == QUARK:
        rule = _quark_rule(described, refuse)
        linears, plain = _of_quark(shards)
    else:
        raise refuse(f"quant_method = {method!r:.200} and no manifest of mxtorq")
    _require_kept(plain, shards)
    return Packed(
        folder=folder,
        config=config,
        shards=shards,
        linears=linears,
        plain=plain,
        unquantized=_unquantized(config, plain, shards),
        input_rule=rule,
        records_rule=method == QUARK,
    )


def _of_packed(shards: Shards) -> tuple[dict[str, tuple[str, str]], list[str]]:
    ending = ".weight_packed"
    linears = {
        name.removesuffix(ending): (name, f"{name.removesuffix(ending)}.weight_scale")
        for name in shards.names
        if name.endswith(ending)
    }
    return linears, _checked(linears, shards)


def _of_quark(shards: Shards) -> tuple[dict[str, tuple[str, str]], list[str]]:
    ending = ".weight_scale"
    linears = {
        name.removesuffix(ending): (f"{name.removesuffix(ending)}.weight", name)
        for name in shards.names
        if name.endswith(ending)
    }
    return linears, _checked(linears, shards)


def _checked(linears: Mapping[str, tuple[str, str]], shards: Shards) -> list[str]:
    """The tensors that belong to no quantized linear, after a look at the shapes of those."""
    if not linears:
        raise shards.refuse("no quantized linear", "there is nothing to export")
    for linear, (packed, scales) in linears.items():
        codes, bytes_ = shards.entry(packed), shards.entry(scales)
        rows, half = codes.shape if len(codes.shape) == 2 else (0, 0)
        expected = (rows, 2 * half // BLOCK)
        if {codes.dtype, bytes_.dtype} != {torch.uint8} or bytes_.shape != expected or not half:
            raise shards.refuse(
                f"{linear} with codes {codes.dtype} {codes.shape} and scales {bytes_.dtype} "
                f"{bytes_.shape}",
                "MXFP4 keeps two codes a byte and one scale byte for 32 weights",
            )
    taken = {name for pair in linears.values() for name in pair}
    return [name for name in shards.names if name not in taken]


def _require_kept(plain: list[str], shards: Shards) -> None:
    """Refuse tensors that say more of a linear than its codes, scales and bias."""
    for name in plain:
        entry = shards.entry(name)
        if not name.endswith((".weight", ".bias")) or entry.dtype not in _FLOATS:
            raise shards.refuse(
                f"the tensor {name!r:.200}, {entry.dtype}",
                "it is part of a quantization that is more than codes and E8M0 scales (a global "
                "scale, a rotation, a zero point), and leaving it out would change the model",
            )


def _unquantized(config: Mapping[str, Any], plain: list[str], shards: Shards) -> list[str]:
    """Matrices that are not quantized; an embedding among them does no harm."""
    matrices = {
        name.removesuffix(".weight") for name in plain if len(shards.entry(name).shape) == 2
    }
    return sorted({*matrices, HEAD} if config.get("tie_word_embeddings", True) else matrices)


def _compressed_tensors_rule(described: Mapping[str, Any], refuse: Refusal) -> ScaleRule | None:
    if described.get("transform_config") or described.get("kv_cache_scheme"):
        raise refuse(
            "a transform_config or a kv_cache_scheme",
            "inputs are transformed or the cache is quantized while the model runs, which no other "
            "layout here can say",
        )
    groups = described.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if not groups or any(not isinstance(group, dict) for group in groups):
        raise refuse("no config_groups")
    formats = [group.get("format") or described.get("format") for group in groups]
    inputs = [group.get("input_activations") for group in groups]
    if any(each != FORMAT for each in formats) or any(each != inputs[0] for each in inputs):
        raise refuse(f"config_groups of the formats {formats!r:.200}", f"only {FORMAT} is read")
    for tensor in (*(group.get("weights") for group in groups), inputs[0]):
        if tensor is not None and not _says(tensor, num_bits=4, type="float", group_size=BLOCK):
            raise refuse(f"a tensor quantized as {tensor!r:.300}", "it is no MXFP4")
    return None if inputs[0] is None else ScaleRule.EVEN  # what the library and vLLM compute


def _quark_rule(described: Mapping[str, Any], refuse: Refusal) -> ScaleRule | None:
    for key in (
        *("layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config"),
        *("algo_config", "softmax_quant_spec", "kv_cache_post_rope"),
    ):
        if described.get(key):
            raise refuse(
                f"{key} = {described[key]!r:.300}",
                "only one MXFP4 configuration for all linears, without anything that runs online, "
                "can be exported",
            )
    layer = described.get("global_quant_config")
    layer = layer if isinstance(layer, dict) else {}
    inputs = layer.get("input_tensors")
    for tensor in (layer.get("weight"), *([] if inputs is None else [inputs])):
        if not _says(
            tensor, dtype="fp4", qscheme="per_group", group_size=BLOCK, scale_format="e8m0"
        ):
            raise refuse(f"a tensor quantized as {tensor!r:.300}", "it is no MXFP4")
    if layer.get("output_tensors") or layer.get("bias"):
        raise refuse("quantized outputs or biases", "no other layout here can say that")
    if inputs is None:
        return None
    mode = str(inputs.get("scale_calculation_mode"))
    return _QUARK_RULES.get(mode, ScaleRule.EVEN)  # as Quark takes every other word


def _says(value: Any, **expected: Any) -> bool:
    return isinstance(value, dict) and all(value.get(k) == v for k, v in expected.items())
