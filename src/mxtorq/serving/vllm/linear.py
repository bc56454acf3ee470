"""vLLM's quantization method ``mxtorq``: checkpoints whose transforms run online.

vLLM asks the configuration for the method of each linear by its name; the method makes parameters
under the checkpoint's names, so that vLLM's own loader fills, fuses and splits them, and computes
through one operator that ``torch.compile`` sees as a whole.

The transforms stand in a safetensors file beside the weights, which vLLM reads with the others:
`get_checkpoint_weight_mapper` drops them from that stream, and the plugin reads the file itself,
in float64, as no parameter of vLLM would keep them.
"""

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter
from vllm.utils.torch_utils import direct_register_custom_op

from mxtorq.errors import CheckpointError
from mxtorq.export.carried import STORED_NAME
from mxtorq.export.compressed_tensors import FORMAT, OWN, STOCK
from mxtorq.export.manifest import SiteEntry
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.spec import BLOCK
from mxtorq.models.family import SiteName
from mxtorq.serving.vllm.checkpoint import (
    Checkpoint,
    find_checkpoint,
    no_experts,
    require_whole_blocks,
    unfused,
)
from mxtorq.serving.vllm.product import multiply, rank_input

OPERATOR = "mxtorq_linear"


class MxtorqConfig(QuantizationConfig):
    """What a checkpoint says, and which method each layer gets."""

    def __init__(self, ignore: list[str]) -> None:
        super().__init__()
        self.ignore = ignore
        self.checkpoint: Checkpoint | None = None

    def get_name(self) -> str:
        return OWN

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]  # E8M0 scales exceed the range of float16

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the first with BF16

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MxtorqConfig":
        return cls(ignore=list(config.get("ignore") or []))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """``--quantization mxtorq`` runs our stock-format checkpoints here too, on any device."""
        stock = hf_quant_cfg.get("quant_method") == STOCK and hf_quant_cfg.get("format") == FORMAT
        return OWN if stock and user_quant == OWN else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """vLLM says where the checkpoint is."""
        self.checkpoint = find_checkpoint(model_name, revision)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Drops the transforms, which no module of vLLM has a parameter for."""
        transforms = re.compile(rf"\.(?:{'|'.join(SiteName)})\.")
        dropped = WeightsMapper(orig_to_new_regex={transforms: None, STORED_NAME: None})
        return QuantizationConfig.get_checkpoint_weight_mapper() | dropped

    def get_quant_method(self, layer: Module, prefix: str) -> Any:
        assert self.checkpoint is not None  # vLLM calls maybe_update_config first
        if isinstance(layer, RoutedExperts):
            raise no_experts(prefix)
        if not isinstance(layer, LinearBase):
            return None
        linears = unfused(prefix, self.packed_modules_mapping)
        entry = self.checkpoint.site_of(linears)
        if entry is not None:
            return MxtorqLinearMethod(self.checkpoint, entry, prefix)
        if all(linear in self.ignore for linear in linears):
            return UnquantizedLinearMethod()
        raise CheckpointError(
            asked=f"the weights of {prefix}",
            found=f"a checkpoint that knows no {', '.join(linears)}",
            why="it must say of each linear whether it is quantized",
            todo="compare the names with the manifest; this architecture of vLLM may call its "
            "modules otherwise than transformers does",
        )


@register_weight_loader_v2_supported_method
class MxtorqLinearMethod(LinearMethodBase):
    """A linear, fused or not, whose input is transformed and rounded to MXFP4."""

    def __init__(self, checkpoint: Checkpoint, entry: SiteEntry, prefix: str) -> None:
        self.checkpoint, self.entry, self.prefix = checkpoint, entry, prefix

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if input_size != self.entry.width:
            raise CheckpointError(
                asked=f"{self.prefix} with inputs of {input_size} features",
                found=f"a transform of {self.entry.width} features in the manifest",
                why="a transform maps all features of a linear's input",
                todo="quantize again; do not mix files of two checkpoints",
            )
        width = input_size_per_partition
        require_whole_blocks(self.prefix, width, BLOCK, input_size // width)
        rows = sum(output_partition_sizes)
        common = {
            "input_dim": 1,
            "output_dim": 0,
            "weight_loader": extra_weight_attrs["weight_loader"],
        }
        packed = torch.empty(rows, width // 2, dtype=torch.uint8)
        scale = torch.empty(rows, width // BLOCK, dtype=torch.uint8)
        layer.register_parameter("weight_packed", ModelWeightParameter(data=packed, **common))
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=scale, **common))
        publish(layer, self.prefix)

    def process_weights_after_loading(self, layer: Any) -> None:
        width = BLOCK * layer.weight_scale.shape[1]
        split = width != self.entry.width
        rank = layer.tp_rank if split else 0
        layer.mxtorq_rounded = rank_input(
            self.checkpoint.transform_of(self.entry),
            self.checkpoint.rule,
            layer.weight_packed.device,
            slice(rank * width, (rank + 1) * width) if split else None,
            tensor_model_parallel_all_gather if split else None,
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return call(self.prefix, x, bias, len(layer.weight_packed))


def publish(layer: Module, prefix: str) -> None:
    """Let the operator find a layer by its name, as vLLM's attention does."""
    get_current_vllm_config().compilation_config.static_forward_context[prefix] = layer


def call(prefix: str, x: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """The operator on a published layer."""
    result: Tensor = getattr(torch.ops.vllm, OPERATOR)(x, bias, rows, prefix)
    return result


def register_operator() -> None:
    """Make `call` possible in this process, once."""
    if not hasattr(torch.ops.vllm, OPERATOR):
        direct_register_custom_op(OPERATOR, _linear, fake_impl=_linear_shape)


def _linear(x: Tensor, bias: Tensor | None, rows: int, name: str) -> Tensor:
    layer = get_forward_context().no_compile_layers[name]
    weight = MXFP4(layer.weight_packed.data, layer.weight_scale.data)
    return multiply(layer.mxtorq_rounded, x, weight, bias)


def _linear_shape(x: Tensor, bias: Tensor | None, rows: int, name: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))
