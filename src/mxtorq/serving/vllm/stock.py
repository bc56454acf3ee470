"""A kernel for stock ``compressed-tensors`` MXFP4 checkpoints.

vLLM's own scheme stays in charge of names, shapes and loading; it asks the platform for a kernel
that multiplies. CPUs have none, so this one makes such checkpoints run there, ours and others'.
On CUDA it stands behind vLLM's own kernels, which are faster, and of which those for SM75 to SM90
leave activations in BF16: ``--quantization mxtorq`` computes our checkpoints in W4A4 there.

A checkpoint of ours says in its manifest by which scale rule activations are rounded. Others do not
say: they get ``even``, by which compressed-tensors, the library that writes the format, rounds them
itself and by which vLLM's own emulation does.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear.mxfp4.base import (
    MxFp4LinearKernel,
    MxFp4LinearLayerConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.transform.module import (
    HadamardTransform,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Dynamic

from mxtorq.export.checkpoint import is_checkpoint
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK
from mxtorq.serving.vllm.checkpoint import folder_of, read_description, require_whole_blocks
from mxtorq.serving.vllm.linear import call, publish
from mxtorq.serving.vllm.product import rank_input
from mxtorq.transforms.rotation import Identity


class MxtorqMxFp4LinearKernel(MxFp4LinearKernel):
    """Emulated W4A4 with mxtorq's kernels."""

    def __init__(self, config: MxFp4LinearLayerConfig) -> None:
        super().__init__(config)
        self.rule = activation_rule(str(get_current_vllm_config().model_config.model))

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: MxFp4LinearLayerConfig) -> tuple[bool, str | None]:
        if config.activation_quant_key != kMxfp4Dynamic:
            return False, "rounds activations to MXFP4 and serves no other kind"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        width = layer.input_size_per_partition
        require_whole_blocks(layer.prefix, width, BLOCK, layer.input_size // width)
        layer.weight_packed = Parameter(layer.weight.data, requires_grad=False)
        layer.weight_scale = Parameter(layer.weight_scale.data, requires_grad=False)
        del layer.weight
        device: torch.device = layer.weight_packed.device
        layer.mxtorq_rounded = rank_input(Identity(width), self.rule, device)
        publish(layer, layer.prefix)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return call(layer.prefix, x, bias, len(layer.weight_packed))


def complete_transforms() -> None:
    """On CPUs vLLM asks a module for its product, which it gives to linears and not to the online
    transforms of ``transform_config``; so they get the plain one."""
    if not hasattr(HadamardTransform, "cpu_linear"):
        HadamardTransform.cpu_linear = staticmethod(torch.nn.functional.linear)


@cache
def activation_rule(model: str) -> ScaleRule:
    """The rule of a checkpoint's manifest, or ``even`` where there is none."""
    folder = folder_of(model)
    if is_checkpoint(folder):
        return ScaleRule(read_description(folder).scale_rules["activations"])
    return ScaleRule.EVEN
