"""mxtorq: 4-bit MXFP4 (W4A4) quantization of large language models with rotations.

The public names below are imported when they are first used, so that ``import mxtorq`` costs
nothing. All that it does is to let transformers know of mxtorq's checkpoints, once transformers is
imported (`serving.registration`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mxtorq.serving.registration import announce as _announce

if TYPE_CHECKING:
    from mxtorq.comparison import compare
    from mxtorq.config import EvaluationPlan, Recipe, parse_method, parse_rounding
    from mxtorq.errors import MxtorqError
    from mxtorq.export.targets import Target
    from mxtorq.formats.e8m0 import ScaleRule
    from mxtorq.formats.mxfp4 import MXFP4
    from mxtorq.loading.checkpoint import load
    from mxtorq.models.family import Family
    from mxtorq.pipeline import evaluate, quantize
    from mxtorq.rounding.gptq import GPTQ
    from mxtorq.transforms.torq.method import TORQ

_HOMES = {
    "GPTQ": "mxtorq.rounding.gptq",
    "EvaluationPlan": "mxtorq.config",
    "Family": "mxtorq.models.family",
    "MXFP4": "mxtorq.formats.mxfp4",
    "MxtorqError": "mxtorq.errors",
    "Recipe": "mxtorq.config",
    "ScaleRule": "mxtorq.formats.e8m0",
    "Target": "mxtorq.export.targets",
    "TORQ": "mxtorq.transforms.torq.method",
    "compare": "mxtorq.comparison",
    "evaluate": "mxtorq.pipeline",
    "load": "mxtorq.loading.checkpoint",
    "parse_method": "mxtorq.config",
    "parse_rounding": "mxtorq.config",
    "quantize": "mxtorq.pipeline",
}

__all__ = [
    "GPTQ",
    "MXFP4",
    "TORQ",
    "EvaluationPlan",
    "Family",
    "MxtorqError",
    "Recipe",
    "ScaleRule",
    "Target",
    "compare",
    "evaluate",
    "load",
    "parse_method",
    "parse_rounding",
    "quantize",
]

_announce()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mxtorq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
