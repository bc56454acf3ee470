"""What a checkpoint is made for: how its engine scales activations, and what it can transform.

A checkpoint that is calibrated under one rule and run under another loses accuracy in silence, so
the target decides before calibration. Facts about engines as read in vLLM 0.33, compressed-tensors
0.20 and transformers 5.23.
"""

from dataclasses import dataclass
from enum import StrEnum

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.base import Transform
from mxtorq.transforms.engine_matrix import EngineMatrix, engine_matrix
from mxtorq.transforms.rotation import BlockRotation


class Target(StrEnum):
    """Who runs the checkpoint. `card` explains each."""

    MXTORQ = "mxtorq"
    VLLM_BLACKWELL = "vllm-blackwell"
    VLLM_EMULATION = "vllm-emulation"
    ROCM = "rocm"
    TRANSFORMERS = "transformers"

    @property
    def card(self) -> "TargetCard":
        return _CARDS[self]


@dataclass(frozen=True, kw_only=True)
class TargetCard:
    """What a target does."""

    activations: ScaleRule | None
    """The rule of its activations; None: the one that the checkpoint names."""
    transforms: str
    """``all``, one ``matrix`` for all blocks of a linear without bias, or ``none``."""
    why: str


_CARDS = {
    Target.MXTORQ: TargetCard(
        activations=None,
        transforms="all",
        why="mxtorq.load, transformers and vLLM with mxtorq installed run every transform",
    ),
    Target.VLLM_BLACKWELL: TargetCard(
        activations=ScaleRule.RCEIL,
        transforms="matrix",
        why="FlashInfer rounds activations under rceil from SM100 on; transform_config carries one "
        "matrix for all blocks of a fused input, for linears without a bias and without experts",
    ),
    Target.VLLM_EMULATION: TargetCard(
        activations=ScaleRule.EVEN,
        transforms="matrix",
        why="vLLM's emulation rounds activations under even; transforms as on Blackwell",
    ),
    Target.ROCM: TargetCard(
        activations=ScaleRule.EVEN,
        transforms="matrix",
        why="even is what Quark's checkpoints for gfx950 are made for; transforms as on Blackwell",
    ),
    Target.TRANSFORMERS: TargetCard(
        activations=ScaleRule.EVEN,
        transforms="none",
        why="compressed-tensors rounds activations under even, and transformers drops "
        "transform_config in silence",
    ),
}


def carried(transform: Transform, target: Target, site: str, *, plain: bool) -> Transform:
    """The transform as the target will really apply it.

    Args:
        transform: what is left online after merging.
        target: who applies it.
        site: for the message.
        plain: whether no linear of the site has a bias or belongs to an expert.

    Raises:
        UsageError: the target cannot.
    """
    card = target.card
    if card.transforms == "all" or transform.kind == "identity":
        return transform
    shared = isinstance(transform, BlockRotation) and len(transform.rotation) == BLOCK
    if card.transforms == "matrix" and plain and isinstance(transform, BlockRotation) and shared:
        return engine_matrix(transform.width, transform.rotation)
    found = f"a transform of kind {transform.kind!r}"
    if isinstance(transform, (BlockRotation, EngineMatrix)):
        found += "" if plain else " on linears with a bias or of experts"
    raise UsageError(
        asked=f"the target {target.value} for {site}",
        found=f"{found}, which has to run online",
        why=f"{card.why}; what an engine does not run it drops, and the numbers become noise",
        todo="choose a method that leaves at most one 32 x 32 rotation online (hadamard), or "
        "nothing (identity, smoothquant), or the target mxtorq",
    )
