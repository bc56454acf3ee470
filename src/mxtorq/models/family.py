"""What a model family is: the names of the modules that matter, and who feeds whom.

A *site* is an input that several linears share and that is transformed and quantized once. Each
decoder layer of the families here has four: qkv, o, gate/up and down. Embeddings, norms and the
head are never quantized. Where an MLP is many experts, a ``{}`` in a name stands for an expert's
number, and `Family.bound` puts the numbers of a model there.

The *residual stream* is written by the embedding and by a layer's ``residual_writers``; it is read
by the sites with ``reads_residual``, each through the norm that is its source, and by the head
through the final norm. That is all a merged rotation of the stream has to know.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

from mxtorq.errors import ModelError


class SiteName(StrEnum):
    """The four inputs of a decoder layer that are quantized."""

    QKV_IN = "qkv_in"
    O_IN = "o_in"
    GATE_UP_IN = "gate_up_in"
    DOWN_IN = "down_in"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One shared input inside a decoder layer; paths are relative to the layer."""

    name: SiteName
    linears: tuple[str, ...]
    """The linears that read it. The first one is where the input is captured."""
    source: str
    """The norm or linear whose output channels are this input's channels: scaling a channel there
    and unscaling the columns of ``linears`` keeps the function."""
    reads_residual: bool = False
    """The input is the residual stream behind an RMSNorm, and ``source`` is that norm."""
    kept_readers: tuple[str, ...] = ()
    """What else reads the source's output and stays in BF16: a router."""
    tap: str = ""
    """The module whose first input this is for all linears together; "" where a linear's is."""
    experts: int = 0
    """How many experts share the site: ``linears`` has as many equal groups. 0: no experts, or not
    known yet."""
    passes: int = 1
    """Inputs that a token has here: the experts that it goes to, at a site inside of them."""
    more_sources: tuple[str, ...] = ()
    """The other experts' ``source``: their channels are scaled alike."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything whose output channels are this input's."""
        return (self.source, *self.more_sources)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears that see the same tokens: all of them, or those of each expert."""
        size = len(self.linears) // max(1, self.experts)
        return tuple(self.linears[at : at + size] for at in range(0, len(self.linears), size))

    @property
    def taps(self) -> tuple[str, ...]:
        """The modules whose first inputs, together, are what the site sees."""
        return (self.tap,) if self.tap else tuple(group[0] for group in self.groups)

    def bound(self, experts: int, per_token: int) -> "Site":
        """The site with the numbers of that many experts in its names."""
        if self.experts or not any("{}" in path for path in self.linears):
            return self
        numbers = range(experts)
        sources = _numbered((self.source,), numbers)
        return replace(
            self,
            linears=_numbered(self.linears, numbers),
            source=sources[0],
            more_sources=sources[1:],
            experts=experts,
            passes=1 if self.tap else per_token,
        )


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Where the experts of a layer are and how many."""

    module: str
    """What holds them; it is called with the tokens, the experts of each, and their weights."""
    count: str
    """The name of their number in the configuration."""
    per_token: str
    """Likewise of the experts that a token goes to."""


def _numbered(paths: tuple[str, ...], numbers: range) -> tuple[str, ...]:
    """Each expert's paths, one expert after the other; paths without a ``{}`` as they are."""
    if not any("{}" in path for path in paths):
        return paths
    plain = tuple(path for path in paths if "{}" not in path)
    return plain + tuple(
        path.format(number) for number in numbers for path in paths if "{}" in path
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """A decoder architecture as data."""

    name: str
    model_type: str
    """``model_type`` in config.json."""
    architecture: str
    """The transformers class in config.json's ``architectures``."""
    layers: str
    embedding: str
    rotary: str
    """The module that holds computed, unsaved buffers."""
    final_norm: str
    head: str
    sites: tuple[Site, ...]
    residual_writers: tuple[str, ...]
    """The linears of a layer whose outputs are added to the residual stream."""
    experts: Experts | None = None

    def bound(self, config: Any) -> "Family":
        """The family of one model: with the numbers of its experts, if it has any.

        Args:
            config: the model's configuration, as transformers builds it.
        """
        if self.experts is None:
            return self
        count = int(getattr(config, self.experts.count))
        per_token = int(getattr(config, self.experts.per_token))
        return replace(
            self,
            sites=tuple(site.bound(count, per_token) for site in self.sites),
            residual_writers=_numbered(self.residual_writers, range(count)),
        )

    def site(self, name: SiteName) -> Site:
        """The site called ``name``."""
        return next(site for site in self.sites if site.name == name)

    def site_name(self, layer: int, site: Site) -> str:
        """The full name of a site: ``model.layers.3.down_in``."""
        return f"{self.layers}.{layer}.{site.name}"

    def linear_name(self, layer: int, linear: str) -> str:
        """The full name of a linear: ``model.layers.3.mlp.down_proj``."""
        return f"{self.layers}.{layer}.{linear}"


GATED_DECODER_SITES = (
    Site(
        name=SiteName.QKV_IN,
        linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        source="input_layernorm",
        reads_residual=True,
    ),
    Site(name=SiteName.O_IN, linears=("self_attn.o_proj",), source="self_attn.v_proj"),
    Site(
        name=SiteName.GATE_UP_IN,
        linears=("mlp.gate_proj", "mlp.up_proj"),
        source="post_attention_layernorm",
        reads_residual=True,
    ),
    Site(name=SiteName.DOWN_IN, linears=("mlp.down_proj",), source="mlp.up_proj"),
)
"""Pre-norm attention and a gated MLP, with the module names that Llama gave them."""

GATED_DECODER_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""What such a layer adds to the residual stream."""


def find_family(config: Mapping[str, object], families: Mapping[str, Family]) -> Family:
    """The family of a model by its config.json.

    Raises:
        ModelError: none of them has this ``model_type``; the message names the nearest one and what
            it would expect.
    """
    model_type = str(config.get("model_type"))
    for family in families.values():
        if family.model_type == model_type:
            return family
    near = get_close_matches(model_type, [f.model_type for f in families.values()], 1, cutoff=0.0)
    nearest = next(f for f in families.values() if not near or f.model_type == near[0])
    sites = "; ".join(f"{site.name}: {', '.join(site.linears)}" for site in nearest.sites)
    raise ModelError(
        asked=f"a model of type {model_type!r} (architectures: {config.get('architectures')})",
        found=f"the families {', '.join(families)}",
        why="mxtorq rewrites only decoders whose modules it knows by name; a guess could change "
        "what the model computes",
        todo=f"the nearest family is {nearest.name!r} with the sites {sites}. If yours has the "
        "same structure, describe it as a Family and pass it (mxtorq/models/__init__.py says how)",
    )
