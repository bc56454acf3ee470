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
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.chain import Chain
from mxtorq.transforms.diagonal import Diagonal
from mxtorq.transforms.hadamard import Hadamard
from mxtorq.transforms.hires.method import HiRes
from mxtorq.transforms.kronecker import KroneckerRotation
from mxtorq.transforms.permutation import Permutation
from mxtorq.transforms.rotation import BlockRotation, Identity, IdentityMethod
from mxtorq.transforms.torq.method import TORQ
from mxtorq.transforms.torq.rotation import TwoLevelRotation
from mxtorq.transforms.wush import WUSH

METHODS: dict[str, type[TransformMethod]] = {
    "identity": IdentityMethod,
    "hadamard": Hadamard,
    "torq": TORQ,
    "wush": WUSH,
    "hires": HiRes,
}
"""Methods by the name that a recipe, the command line and every table use."""

KINDS: dict[str, type[Transform]] = {
    kind.kind: kind
    for kind in (
        Identity,
        BlockRotation,
        TwoLevelRotation,
        BlockMatrices,
        Chain,
        Diagonal,
        KroneckerRotation,
        Permutation,
    )
}
"""Transforms by the ``kind`` that a checkpoint stores."""
