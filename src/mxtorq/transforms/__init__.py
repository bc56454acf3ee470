"""Invertible maps of the feature axis, and the methods that choose them from activations.

Lives here: what a transform is and what a method may see (`base`), transforms that several methods
share (`rotation`, `block_matrices`, `kronecker`, `diagonal`, `permutation`, `chain`), what engines
apply (`engine_matrix`), and one file or folder a paper, under its name (`torq`, `duquant`, `wush`).
Does not live here: modules, files, Hugging Face. A method takes statistics and returns a value.

To add a method:
1. Write a frozen dataclass of its options, a `TransformMethod`, in a file under the paper's name.
   `fit` chooses a site's transform; `rotations` what is merged into the whole model beforehand. If
   no transform here expresses its result, add one with its ``kind``.
2. Put it into `METHODS` (and a new transform into `KINDS`).
3. Give it a test in ``tests/transforms/``; the contract test there runs over both tables.
4. Write its page, ``docs/methods/NAME.md``, and its rows in ``docs/methods/README.md``.
Without touching this package: name any importable one as ``package.module:ClassName``.
"""

from mxtorq.transforms.base import Transform, TransformMethod
from mxtorq.transforms.brq import BRQ
from mxtorq.transforms.chain import LINKS, Chain
from mxtorq.transforms.duquant.method import DuQuant, DuQuantPlusPlus
from mxtorq.transforms.engine_matrix import EngineMatrix
from mxtorq.transforms.hadamard import Hadamard
from mxtorq.transforms.hires.method import HiRes
from mxtorq.transforms.mxtorq.method import MXTORQ
from mxtorq.transforms.perq import PeRQ
from mxtorq.transforms.quarot import QuaRot
from mxtorq.transforms.rotation import Identity, IdentityMethod
from mxtorq.transforms.smoothquant import SmoothQuant
from mxtorq.transforms.spinquant import SpinQuant
from mxtorq.transforms.torq.method import TORQ
from mxtorq.transforms.wush import WUSH

METHODS: dict[str, type[TransformMethod]] = {
    "mxtorq": MXTORQ,
    "identity": IdentityMethod,
    "hadamard": Hadamard,
    "torq": TORQ,
    "duquant++": DuQuantPlusPlus,
    "duquant": DuQuant,
    "smoothquant": SmoothQuant,
    "perq": PeRQ,
    "quarot": QuaRot,
    "brq": BRQ,
    "spinquant": SpinQuant,
    "wush": WUSH,
    "hires": HiRes,
}
"""Methods by the name that a recipe, the command line and every table use."""

KINDS: dict[str, type[Transform]] = {
    Identity.kind: Identity,
    Chain.kind: Chain,
    EngineMatrix.kind: EngineMatrix,
    **LINKS,
}
"""Transforms by the ``kind`` that a checkpoint stores."""
