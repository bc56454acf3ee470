"""Where things are in a decoder: pure data, no torch.

Lives here: what a family is (`family`) and one file a family (`llama`,
`mistral`, `qwen2`, `qwen3`, `qwen3_moe`).
Does not live here: code that reads or changes a module.

To add a family:
1. Write its `Family` in a file under its name: the names of its modules, site by site.
2. Put it into `FAMILIES`.
3. Add a tiny random configuration of it to ``tests/tiny_models.py``; the surgery tests run over it.
A family whose norms, attention or MLP compute something else than Llama's needs more than data.

A family of your own needs no change here: pass it as an object, ``mxtorq.quantize(..., family=F)``
and ``mxtorq.load(path, family=F)``, or ``--family package.module:NAME``.
"""

from mxtorq.models.family import Family
from mxtorq.models.llama import LLAMA
from mxtorq.models.mistral import MISTRAL
from mxtorq.models.qwen2 import QWEN2
from mxtorq.models.qwen3 import QWEN3
from mxtorq.models.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE)
}
"""The families that mxtorq knows, by name."""
