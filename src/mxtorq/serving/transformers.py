"""Rotated checkpoints in transformers: ``import mxtorq``, then ``from_pretrained``.

    import mxtorq
    model = AutoModelForCausalLM.from_pretrained("folder-or-hub-id")

The model is the one that `mxtorq.load` builds: transformers makes the module on ``meta``, the
quantized linears are replaced there by the same `MXFP4Linear` with the same transforms, and
transformers then loads the tensors into it. What it is asked for stays its own business: devices,
attention, generation, and the dtype, which is the one of config.json (bfloat16) unless ``dtype=``
says otherwise. `mxtorq.load` computes in float32 on a CPU; with ``dtype=torch.float32`` both give
the same bits there. Transforms are float64 values whatever the dtype is.

The tensors of such a checkpoint stand under a name that transformers does not look for, so that it
stops where this adapter is not imported (`export.compressed_tensors`). The adapter gives it the
name. The folder is checked as `mxtorq.load` checks it, the hash of every file included, which reads
the weights once before transformers does. Of a hub repository every file that the manifest names is
fetched for that.

Checked with transformers 5.17 to 5.23. Refused: a family of the caller's own, weights that are
offloaded or split over devices within a linear, training, and saving, which would have to hash and
describe again what `mxtorq quantize` wrote.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxtorq.errors import CheckpointError, MxtorqError, UsageError
from mxtorq.export.carried import STORED_NAME
from mxtorq.export.compressed_tensors import OWN, WEIGHTS, WEIGHTS_FILE
from mxtorq.export.manifest import FILE, LONGEST, Manifest
from mxtorq.reading.documents import Refusal, read_text
from mxtorq.reading.shards import Shards
from mxtorq.serving.registration import announce


class MxtorqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a rotated checkpoint, as it stands in config.json."""

    def __init__(self, **content: Any) -> None:
        vars(self).update(content)
        self.quant_method: Any = OWN


def carrying(stock: Any) -> Any:
    """transformers' own configuration of compressed-tensors, but for checkpoints of ours that have
    transforms in it, which that would drop: they get ours."""

    class Carrying(stock):  # type: ignore[misc]
        ours = True

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], *more: Any, **named: Any) -> Any:
            if WEIGHTS in config_dict:
                return MxtorqConfig(**config_dict)
            return stock.from_dict(config_dict, *more, **named)

    return Carrying


class MxtorqQuantizer(HfQuantizer):
    """What transformers asks while it loads a rotated checkpoint, in the order of the methods."""

    requires_calibration = True  # it reads quantized weights and makes none

    def validate_environment(self, *asked: Any, device_map: Any = None, **more: Any) -> None:
        """Asked before, and again when an automatic device_map is worked out.

        Raises:
            UsageError: layers would be off the accelerator.
        """
        devices = (
            {str(each) for each in device_map.values()}
            if isinstance(device_map, Mapping)
            else set()
        )
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise UsageError(
                asked="a checkpoint of mxtorq with layers off the accelerator",
                found=f"a device_map with {', '.join(sorted(devices))}",
                why="the transforms of a layer do not travel with weights that come and go",
                todo="pass a device_map of accelerators alone, or of the CPU alone",
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the file with the tensors. Of all that transformers asks before it looks for files,
        this alone shows the configuration, attention or not.

        Raises:
            CheckpointError: the checkpoint does not say which file that is.
            UsageError: its linears would be split over devices.
        """
        named = getattr(self.quantization_config, WEIGHTS, None)
        if named not in (WEIGHTS_FILE[OWN], f"{WEIGHTS_FILE[OWN]}.index.json"):
            raise CheckpointError(
                asked="a checkpoint of mxtorq for transformers",
                found=f"{WEIGHTS} = {named!r:.200} in the quantization_config of its config.json",
                why="transformers has to be told in which file the tensors are",
                todo="quantize again with this release, or use mxtorq.load, which looks itself",
            )
        if getattr(config, "distributed_config", None) is not None:
            raise UsageError(
                asked="a checkpoint of mxtorq over several devices (distributed_config, tp_plan)",
                found="sites with transforms",
                why="a transform maps all features of a linear's input, and the shards of a linear "
                "have a part of them each",
                todo="leave it out; device_map places whole layers",
            )
        config.transformers_weights = named
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same in transformers 5.17, which does not ask the former."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: Any, **asked: Any) -> Any:
        """Replace the quantized linears of a model that is on ``meta``."""
        vars(model.config).pop("transformers_weights", None)  # of use for finding files alone
        files = [Path(file) for file in asked.get("checkpoint_files") or ()]
        with _reading():
            _restore_(model, files)
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = {*ignored, STORED_NAME.pattern}
        return model

    def update_weight_conversions(self, conversions: Any, *model: Any) -> list[Any]:
        """None: the names in a checkpoint are the names of the modules, experts included."""
        return []

    def _process_model_after_weight_loading(self, model: Any, **asked: Any) -> Any:
        """Bring the transforms to where the weights are."""
        from mxtorq.surgery.linear import MXFP4Linear

        for module in model.modules():
            if isinstance(module, MXFP4Linear):
                module.input.to_(module.weight_packed.device)
        return model.requires_grad_(False)  # rounding has no gradient

    def is_serializable(self) -> bool:
        """No; transformers refuses to save and points to this warning."""
        logging.get_logger(__name__).warning(
            "A checkpoint of mxtorq is written by `mxtorq quantize`, with a manifest that names "
            "every file and its hash. To pass it on, copy its folder."
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """No: rounding has no gradient."""
        return False


def _restore_(model: Any, files: list[Path]) -> None:
    # Here, since a program that imports mxtorq and transformers may never load a checkpoint.
    from mxtorq.export.checkpoint import read_checkpoint
    from mxtorq.loading.checkpoint import require_described, restore_sites_
    from mxtorq.loading.families import family_again
    from mxtorq.loading.skeleton import stored_names
    from mxtorq.surgery.experts import unpack_experts_

    name = str(model.config.name_or_path)
    contents = read_checkpoint(_folder(name, files))
    if sorted(contents.weights.files) != sorted(file.name for file in files):
        raise CheckpointError(
            asked=f"the tensors of the checkpoint {name}",
            found=f"{', '.join(sorted(file.name for file in files))}",
            why=f"its manifest describes {', '.join(sorted(contents.weights.files))}",
            todo="leave out options that choose other files, such as `variant`",
        )
    family = family_again(contents.config, str(contents.manifest.source.get("family")), None)
    if all(family.architecture != kind.__name__ for kind in type(model).__mro__):
        raise UsageError(
            asked=f"the checkpoint {name} as a {type(model).__name__}",
            found=f"a {family.architecture}",
            why="other classes have other parts, which would be left out or filled with noise",
            todo="use AutoModelForCausalLM.from_pretrained",
        )
    unpack_experts_(model, family.bound(model.config))
    shapes = _Shapes(**vars(contents.weights), dtype=model.dtype)
    restore_sites_(model, replace(contents, weights=shapes), name)
    kept = stored_names(model, family)
    require_described(model, contents, name, kept, {*kept, *model.state_dict()})


@dataclass(frozen=True, kw_only=True, eq=False)
class _Shapes(Shards):
    """A model's tensors without values, in the dtypes that they are to be loaded in."""

    dtype: torch.dtype

    def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
        entry = self.entry(name)
        if STORED_NAME.search(name):  # of a transform, which transformers knows nothing of
            return super().tensor(name, rows)
        dtype = self.dtype if entry.dtype.is_floating_point else entry.dtype
        whole = torch.empty(entry.shape, dtype=dtype, device="meta")
        return whole if rows is None else whole[rows]


@contextmanager
def _reading() -> Iterator[None]:
    """Make real tensors: transformers calls with ``meta`` and the model's dtype as defaults."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _folder(name: str, files: list[Path]) -> Path:
    """The folder of a checkpoint whose tensors transformers has found, with all its files."""
    refuse = Refusal(
        kind=CheckpointError,
        asked=f"the checkpoint {name}",
        why="it has to be a folder that `mxtorq quantize` wrote, or such a folder on the hub",
        todo="download the whole repository (`hf download`) and pass its folder",
    )
    if not files:
        raise refuse("tensors without files")
    folder = files[0].parent
    if not Path(name).is_dir():
        _fetch_rest(name, folder, refuse)
    return folder


def _fetch_rest(name: str, folder: Path, refuse: Refusal) -> None:
    """Bring every file that a manifest names to a folder of the hub's cache.

    ``CACHE/models--NAME/snapshots/REVISION/SUBFOLDER`` is how the cache is laid out.
    """
    from transformers.utils.hub import cached_file

    try:
        at = folder.parts.index("snapshots")
        place: dict[str, Any] = {
            "cache_dir": str(Path(*folder.parts[: at - 1])),
            "revision": folder.parts[at + 1],
            "subfolder": "/".join(folder.parts[at + 2 :]),
        }
        cached_file(name, FILE, **place)
        manifest = Manifest.from_json(read_text(folder / FILE, LONGEST, refuse), f"{name}/{FILE}")
        for file in manifest.files:
            if Path(file).name != file:
                raise refuse(f"{file!r:.200} in the manifest", "files are in the folder itself")
            cached_file(name, file, **place)
    except MxtorqError:
        raise
    except Exception as error:  # transformers and the hub share no root
        raise refuse(f"{type(error).__name__}: {error}") from error


announce()  # for a program that imports this module first: it is not complete before
