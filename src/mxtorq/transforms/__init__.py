"""Invertible maps of the feature axis, and the methods that choose them from activations.

Lives here: what a transform is and what a method may see (`base`), transforms that several methods
share (`rotation`, `hadamard`), and one file or folder a paper, under the paper's name (`torq`).
Does not live here: modules, files, Hugging Face. A method takes statistics and returns a value.

To add a method:
1. Write a frozen dataclass of its options with ``fit(statistics, seed) -> Transform`` in a file
   under the paper's name. If no transform here expresses its result, add one with its ``kind``.
2. Put it into `METHODS` (and a new transform into `KINDS`).
3. Give it a test in ``tests/transforms/``; the contract test there runs over both tables.
Without touching this package: name any importable one as ``package.module:ClassName``.
"""

from mxtorq.transforms.base import Transform, TransformMethod
from mxtorq.transforms.brq import BRQ
from mxtorq.transforms.hadamard import Hadamard
from mxtorq.transforms.kronecker import KroneckerRotation
from mxtorq.transforms.quarot import QuaRot
from mxtorq.transforms.rotation import BlockRotation, Identity, IdentityMethod
from mxtorq.transforms.spinquant import SpinQuant
from mxtorq.transforms.torq.method import TORQ
from mxtorq.transforms.torq.rotation import TwoLevelRotation

METHODS: dict[str, type[TransformMethod]] = {
    "identity": IdentityMethod,
    "hadamard": Hadamard,
    "quarot": QuaRot,
    "brq": BRQ,
    "spinquant": SpinQuant,
    "torq": TORQ,
}
"""Methods by the name that a recipe, the command line and every table use."""

KINDS: dict[str, type[Transform]] = {
    kind.kind: kind for kind in (Identity, BlockRotation, KroneckerRotation, TwoLevelRotation)
}
"""Transforms by the ``kind`` that a checkpoint stores."""
