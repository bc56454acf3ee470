"""The compressed-tensors description of MXFP4 W4A4: what goes into config.json.

Format ``mxfp4-pack-quantized`` of vllm-project/compressed-tensors (checked with 0.20): per linear P
the tensors ``P.weight_packed`` uint8 [d_out, d/2], even element in the low nibble, and
``P.weight_scale`` uint8 [d_out, d/32], E8M0; no global scale.

A transform that stock engines would drop must stop them. A checkpoint without transforms carries
``quant_method: compressed-tensors`` and stock engines run it. So does one whose transforms all
stand in ``transform_config`` (`carried`), which vLLM runs and transformers drops. One with other
transforms carries ``quant_method: mxtorq``, which vLLM refuses without our plugin
(`serving.vllm`). transformers merely warns about a method that it does not know and fills the model
with random weights. So the tensors of any checkpoint with transforms stand under a file name that
it does not look for: it stops with an error instead. Its adapter (`serving.transformers`) tells it
the name.
"""

from collections.abc import Mapping
from typing import Any

FORMAT = "mxfp4-pack-quantized"
STOCK = "compressed-tensors"
OWN = "mxtorq"

_FORMAT_VERSION = "0.20.0"

WEIGHTS = "weights_file"
"""The entry of ``quantization_config``, where something is transformed, that names the file with
the tensors, or its index: an adapter has to know before it sees the folder."""

WEIGHTS_FILE = {STOCK: "model.safetensors", OWN: "mxtorq-model.safetensors"}
"""The file with the tensors: where stock engines look for it, and where our adapters alone do."""

_MXFP4: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "zp_dtype": None,
    "observer_kwargs": {},
    "actorder": None,
    "block_structure": None,
}


def weights_file(described: Mapping[str, Any]) -> str:
    """The file with the tensors, or its index's, by a ``quantization_config``."""
    own = WEIGHTS in described or described.get("quant_method") == OWN
    return WEIGHTS_FILE[OWN if own else STOCK]


def quantization_config(
    *, own: bool, ignore: list[str], transforms: Mapping[str, Any]
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        own: whether any site has a transform that our adapters alone run.
        ignore: linears that stay in BF16, by full name.
        transforms: the ``transform_config``; empty for none.
    """
    described = {
        "quant_method": OWN if own else STOCK,
        "format": FORMAT,
        "quantization_status": "compressed",
        "version": _FORMAT_VERSION,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": FORMAT,
                "weights": {**_MXFP4, "dynamic": False, "observer": "memoryless_minmax"},
                "input_activations": {**_MXFP4, "dynamic": True, "observer": None},
                "output_activations": None,
            }
        },
    }
    return {**described, "transform_config": dict(transforms)} if transforms else described
