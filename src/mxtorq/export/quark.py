"""AMD Quark's layout of MXFP4: what goes into config.json, and which rules it can name.

Per linear P: ``P.weight`` uint8 [d_out, d/2] and ``P.weight_scale`` uint8 [d_out, d/32], the very
bytes of compressed-tensors under other names (read in amd-quark 0.13 and vLLM 0.32). One
``global_quant_config`` says fp4, per_group, 32, e8m0 for weights and inputs, and ``exclude`` names
the linears that stay in BF16.

``scale_calculation_mode`` names the rule that inputs are rounded by, which compressed-tensors does
not record. Quark knows ``floor``, ``even`` and ``ceil`` and takes any other word as ``even``
without a warning, so a checkpoint of another rule is refused. vLLM reads past the field: there the
rule is that of the kernel.

Quark's own rotations (``input_rotation``) are not written: vLLM and SGLang would run the model
without them.
"""

from typing import Any

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK

VERSION = "0.13"
"""The version of Quark whose schema this is."""

MODES = {ScaleRule.FLOOR: "floor", ScaleRule.EVEN: "even", ScaleRule.CEIL: "ceil"}
"""Quark's names for scale rules."""


def quark_config(*, exclude: list[str], input_rule: ScaleRule | None) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        exclude: linears that stay as they are, by full name.
        input_rule: how inputs are rounded; None for weights alone (W4A16).

    Raises:
        UsageError: Quark has no name for the rule.
    """
    if input_rule is not None and input_rule not in MODES:
        raise UsageError(
            asked=f"inputs rounded by the scale rule {input_rule.value!r} in Quark's layout",
            found=f"Quark's rules {', '.join(MODES.values())}",
            why="Quark takes any other word as 'even' and would compute something else in silence",
            todo=f"quantize again with --scale-rule {' or '.join(MODES.values())}, or export to "
            "compressed-tensors, which records no rule",
        )
    mode = "even" if input_rule is None else MODES[input_rule]
    return {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": _tensor(mode, dynamic=False),
            "input_tensors": None if input_rule is None else _tensor(mode, dynamic=True),
            "output_tensors": None,
            "bias": None,
            "target_device": None,
        },
        "exclude": exclude,
        "algo_config": None,
        "softmax_quant_spec": None,
        "layer_type_quant_config": {},
        "layer_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "quant_mode": "eager_mode",
        "version": VERSION,
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }


def _tensor(mode: str, *, dynamic: bool) -> dict[str, Any]:
    return {
        "dtype": "fp4",
        "is_dynamic": dynamic,
        "qscheme": "per_group",
        "ch_axis": -1,
        "group_size": BLOCK,
        "block_size": None,
        "symmetric": None,
        "round_method": "half_even",
        "scale_type": "float",
        "scale_format": "e8m0",
        "scale_calculation_mode": mode,
        "mx_element_dtype": None,
        "observer_cls": "PerBlockMXObserver",
        "zero_point_type": "int32",
        "is_scale_quant": False,
    }
