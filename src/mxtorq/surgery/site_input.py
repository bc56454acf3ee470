"""What happens to the input of a site before its linears: transformed, then rounded to MXFP4.

The linears of a site (q, k and v; gate and up) read one tensor, so the work is done once for all of
them. It runs in chunks of tokens whose scratch stays in a core's caches, and where the transform
ends in a product within each MX block, that product and the rounding are one kernel.
"""

import weakref
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import chunks, fresh
from mxtorq.formats.scales import Scale
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import Backend, fake_quantize, pick, rotate_fake_quantize
from mxtorq.transforms.base import Transform
from mxtorq.transforms.torq.rotation import TwoLevelRotation


class SiteInput:
    """The transform and the scale rule of a site's activations, shared by its linears.

    A linear that asks with the very tensor that another one has just asked with gets the same
    result, which is kept until every linear has asked.
    """

    def __init__(self, transform: Transform, scale: Scale, readers: int = 1) -> None:
        """Args:
        transform: T.
        scale: how the scales of activations are chosen.
        readers: linears that share this.
        """
        self.scale = scale
        self.readers = readers
        self._set(transform)
        self._seen: tuple[weakref.ref[Tensor], int] | None = None
        self._rounded: Tensor | None = None
        self._left = 0

    def _set(self, transform: Transform) -> None:
        self.transform = transform
        self._rest, self._matrices = transform.split_blocks()
        self._chain: Any = None  # of a TORQ pair, in the form that Triton's kernel reads

    def to_(self, device: torch.device) -> None:
        """Move the transform. It stays in float64: a cast of the module must not round it."""
        if all(part.device == device for part in self.transform.tensors().values()):
            return  # the first of the linears that share this has moved it
        self._set(self.transform.to(device))

    def __call__(self, inputs: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d"]:
        """The rounded values of x T, computed in float32, in the dtype of ``inputs``."""
        if self.readers == 1 or inputs.is_inference():  # such tensors do not count their changes
            return self._round(inputs)
        same = self._seen is not None and self._seen[0]() is inputs
        if not same or self._seen is None or self._seen[1] != inputs._version:
            self._seen = weakref.ref(inputs), inputs._version
            self._rounded, self._left = self._round(inputs), self.readers
        rounded = self._rounded
        assert rounded is not None
        self._left -= 1
        if self._left == 0:
            self._seen = self._rounded = None
        return rounded

    def _round(self, inputs: Tensor) -> Tensor:
        if inputs.dtype not in (torch.float32, torch.bfloat16):
            return self._round(inputs.float()).to(inputs.dtype)
        if not isinstance(self.scale, ScaleRule):  # its grid may depend on all tokens together
            values = self.transform.online(inputs.float())
            return fake_quantize(values, self.scale).to(inputs.dtype)
        tokens = inputs.reshape(-1, inputs.shape[-1])
        if isinstance(self.transform, TwoLevelRotation) and len(self.transform.inter):
            found = self._round_two_levels(self.transform, tokens)
            if found is not None:
                return found.view(inputs.shape)
        out = fresh(tokens.shape, tokens.dtype, tokens.device)
        if self._rest is None:
            self._round_blocks(tokens, out)
        else:
            for here in chunks(tokens, tokens.shape[1] // BLOCK):
                part = self._rest.online(tokens[here].float())
                if out.dtype == torch.float32:
                    self._round_blocks(part, out[here])
                else:
                    out[here] = self._round_blocks(part, torch.empty_like(part))
        return out.view(inputs.shape)

    def _round_two_levels(self, rotation: TwoLevelRotation, tokens: Tensor) -> Tensor | None:
        """Chain, rotation and rounding in one kernel, where a GPU has it."""
        if pick(Backend.AUTO, tokens.device) is not Backend.TRITON:
            return None
        from mxtorq.kernels.triton.chain import prepare
        from mxtorq.kernels.triton.two_level import two_level_fake_quantize

        assert isinstance(self.scale, ScaleRule)
        inter = rotation.inter
        if self._chain is None:
            parts = (inter.first, inter.second, inter.cos, inter.sin)
            self._chain = prepare(*parts, tokens.shape[1] // BLOCK, tokens.device)
        out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        return two_level_fake_quantize(tokens, self._chain, rotation.intra, self.scale, out=out)

    def _round_blocks(self, values: Tensor, out: Tensor) -> Tensor:
        assert isinstance(self.scale, ScaleRule)
        if self._matrices is None:
            return fake_quantize(values, self.scale, out=out)
        return rotate_fake_quantize(values, self._matrices, self.scale, out=out)
