"""What a model family is: the names of the modules that matter, and who feeds whom.

A *site* is an input that several linears share and that is transformed and quantized once. Each
decoder layer of the families here has four: qkv, o, gate/up and down. Embeddings, norms and the
head are never quantized.

The *residual stream* is written by the embedding and by a layer's ``residual_writers``; it is read
by the sites with ``reads_residual``, each through the norm that is its source, and by the head
through the final norm. That is all a merged rotation of the stream has to know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum

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
