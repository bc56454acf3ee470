"""What a checkpoint is made for: how its engine scales activations, and what it can transform.

A checkpoint that is calibrated under one rule and run under another loses accuracy in silence, so
the target decides before calibration. Facts about engines as read in vLLM 0.33, compressed-tensors
0.20 and transformers 5.23. What other rules than its own cost a checkpoint is measured by
``mxtorq evaluate CHECKPOINT --targets``.
"""

from dataclasses import dataclass
from enum import StrEnum

from jaxtyping import Float64
from torch import Tensor

from mxtorq.errors import UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.spec import BLOCK
from mxtorq.transforms.base import Transform
from mxtorq.transforms.engine_matrix import engine_matrix


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
    """The rule of its activations; None: that of the weights, whichever it is."""
    transforms: str
    """What it runs online: ``all``, one ``matrix`` of a block's size for all blocks of an input
    whose linears have no bias and are no experts, or ``none``."""
    why: str


_CARDS = {
    Target.MXTORQ: TargetCard(
        activations=None,
        transforms="all",
        why="mxtorq.load, and transformers and vLLM with mxtorq installed, run every transform",
    ),
    Target.VLLM_BLACKWELL: TargetCard(
        activations=ScaleRule.RCEIL,
        transforms="matrix",
        why="FlashInfer rounds activations under rceil from SM100 on; transform_config carries one "
        "32 x 32 matrix for all blocks of an input, and vLLM applies it to linears that have no "
        "bias and are no experts",
    ),
    Target.VLLM_EMULATION: TargetCard(
        activations=ScaleRule.EVEN,
        transforms="matrix",
        why="vLLM's emulation rounds activations under even, and runs transforms as on Blackwell: "
        "one 32 x 32 matrix for all blocks of an input, for linears that have no bias and are no "
        "experts",
    ),
    Target.ROCM: TargetCard(
        activations=ScaleRule.EVEN,
        transforms="matrix",
        why="even is what Quark's checkpoints for gfx950 are made for, and vLLM runs transforms as "
        "on Blackwell: one 32 x 32 matrix for all blocks of an input, for linears that have no "
        "bias and are no experts",
    ),
    Target.TRANSFORMERS: TargetCard(
        activations=ScaleRule.EVEN,
        transforms="none",
        why="compressed-tensors rounds activations under even, and transformers drops "
        "transform_config in silence",
    ),
}


def runs(transform: Transform, target: Target, *, plain: bool) -> bool:
    """Whether a target runs what is left online of a transform; ``plain`` as in `carried`."""
    card = target.card
    if card.transforms == "all" or transform.kind == "identity":
        return True
    return card.transforms == "matrix" and plain and _shared(transform) is not None


def _shared(transform: Transform) -> Float64[Tensor, "32 32"] | None:
    """The one matrix for all blocks that a transform is, if it is one."""
    rest, matrices = transform.split_blocks()
    return matrices[0] if rest is None and matrices is not None and len(matrices) == 1 else None


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
    card, shared = target.card, _shared(transform)
    if card.transforms == "all" or transform.kind == "identity":
        return transform
    if shared is not None and runs(transform, target, plain=plain):
        return engine_matrix(transform.width, shared)
    found = f"a transform of kind {transform.kind!r} that has to run online"
    if shared is not None and not plain:
        found += " before linears with a bias or of experts"
    raise UsageError(
        asked=f"the target {target.value} for {site}",
        found=found,
        why=f"{card.why}. What an engine does not run it drops, and the numbers become noise",
        todo=f"choose a method that leaves at most one {BLOCK} x {BLOCK} matrix online (hadamard, "
        "duquant++:smooth=false, torq:levels=intra) or nothing (identity, smoothquant), or the "
        "target mxtorq",
    )
