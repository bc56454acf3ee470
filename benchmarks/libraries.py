"""Who can turn tensors into MXFP4: mxtorq and its peers behind one plate, and what they agree on.

A peer is called through its public functions as its own users would call it, under the scale rule
that it has; mxtorq has every rule and takes the peer's. `disagreement` compares bits, never
tolerances. Adding a library: one function that returns a `Library`, and a line in `PEERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels import dispatch
from mxtorq.kernels.dispatch import Backend

OPERATIONS = ("quantize", "fake_quantize", "dequantize")
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Library:
    """One way to do the work. An operation that a library does not offer is None."""

    name: str
    rule: ScaleRule
    quantize: Callable[[Tensor], Any]
    """From a float tensor to the library's own packed form."""
    parts: Callable[[Any], MXFP4]
    """The codes and scale bytes inside that form."""
    fake_quantize: Callable[[Tensor], Tensor] | None = None
    dequantize: Callable[[Any, torch.dtype], Tensor] | None = None
    dequantize_dtypes: tuple[torch.dtype, ...] = DTYPES
    note: str = ""

    def offers(self, operation: str, dtype: torch.dtype) -> bool:
        """Whether it does an operation in a dtype."""
        if operation == "dequantize" and dtype not in self.dequantize_dtypes:
            return False
        return getattr(self, operation) is not None

    def call(self, operation: str, values: Tensor) -> Callable[[], Any]:
        """The operation on a tensor, or on its packed form, as a call that is ready to be timed."""
        if operation == "dequantize":
            assert self.dequantize is not None
            dequantize, packed, dtype = self.dequantize, self.quantize(values), values.dtype
            return lambda: dequantize(packed, dtype)
        convert = self.quantize if operation == "quantize" else self.fake_quantize
        assert convert is not None
        return lambda: convert(values)


def ours(rule: ScaleRule, backend: Backend = Backend.AUTO) -> Library:
    """mxtorq under a scale rule."""
    return Library(
        name="mxtorq" if backend is Backend.AUTO else f"mxtorq, {backend}",
        rule=rule,
        quantize=lambda values: dispatch.quantize(values, rule, backend=backend),
        parts=lambda packed: packed,
        fake_quantize=lambda values: dispatch.fake_quantize(values, rule, backend=backend),
        dequantize=lambda packed, dtype: dispatch.dequantize(packed, dtype, backend=backend),
    )


def eager() -> Library:
    """mxtorq without compiled kernels, as a peer of itself."""
    return ours(ScaleRule.FLOOR, Backend.EAGER)


def torchao() -> Library:
    """torchao's emulated MX tensor; FLOOR is its default rule."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    def quantize(values: Tensor) -> Any:
        mode = ScaleCalculationMode.FLOOR
        return MXTensor.to_mx(values, torch.float4_e2m1fn_x2, BLOCK, scaling_mode=mode)

    def dequantize(packed: Any, dtype: torch.dtype) -> Tensor:
        values: Tensor = packed.dequantize(dtype)
        return values

    return Library(
        name="torchao",
        rule=ScaleRule.FLOOR,
        quantize=quantize,
        parts=lambda packed: MXFP4(packed.qdata, packed.scale.view(torch.uint8)),
        fake_quantize=lambda values: dequantize(quantize(values), values.dtype),
        dequantize=dequantize,
        note="fake_quantize is MXTensor.to_mx and its dequantize; it has none of its own",
    )


def compressed_tensors() -> Library:
    """compressed-tensors with its MXFP4 preset, whose only rule is EVEN."""
    from compressed_tensors.compressors import MXFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as round_trip
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme("MXFP4", ["Linear"])

    def scales(values: Tensor, args: Any) -> tuple[Tensor, Tensor]:
        blocks = values.unflatten(-1, (-1, BLOCK))
        found: tuple[Tensor, Tensor] = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
        return found

    def quantize(values: Tensor) -> Any:
        scale, _ = scales(values, scheme.weights)
        return MXFP4PackedCompressor.compress({"weight": values, "weight_scale": scale}, scheme)

    def fake_quantize(values: Tensor) -> Tensor:
        scale, zero_point = scales(values, scheme.input_activations)
        rounded: Tensor = round_trip(values, scale, zero_point, scheme.input_activations)
        return rounded

    def dequantize(packed: Any, dtype: torch.dtype) -> Tensor:
        values: Tensor = MXFP4PackedCompressor.decompress(packed, scheme)["weight"]
        return values

    return Library(
        name="compressed-tensors",
        rule=ScaleRule.EVEN,
        quantize=quantize,
        parts=lambda packed: MXFP4(packed["weight_packed"], packed["weight_scale"]),
        fake_quantize=fake_quantize,
        dequantize=dequantize,
        dequantize_dtypes=(torch.bfloat16,),
        note="quantize and fake_quantize include calculate_qparams; decompress gives bfloat16 only",
    )


def ml_dtypes() -> Library:
    """ml_dtypes' casts of elements and scales under NumPy, with the FLOOR rule spelled out here."""
    import ml_dtypes as numbers
    import numpy as np

    def quantize(values: Tensor) -> Any:
        if values.dtype == torch.bfloat16:
            array = values.view(torch.int16).numpy().view(numbers.bfloat16).astype(np.float32)
        else:
            array = values.numpy()
        blocks = array.reshape(*array.shape[:-1], -1, BLOCK)
        amax = np.abs(blocks).max(-1)
        exponent = np.clip(np.frexp(amax)[1] - 3, -127, 127)
        scale = np.ldexp(np.float32(1), np.where(amax == 0, -127, exponent))
        scale[~np.isfinite(amax)] = np.nan
        elements = (blocks / scale[..., None]).astype(numbers.float4_e2m1fn)
        codes = elements.view(np.uint8).reshape(array.shape)
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        return packed, scale.astype(numbers.float8_e8m0fnu).view(np.uint8)

    return Library(
        name="ml_dtypes",
        rule=ScaleRule.FLOOR,
        quantize=quantize,
        parts=lambda pair: MXFP4(torch.from_numpy(pair[0]), torch.from_numpy(pair[1])),
        note="its casts under NumPy, the rule through numpy.frexp; always one thread",
    )


PEERS: dict[str, Callable[[], Library]] = {
    "mxtorq": eager,
    "torchao": torchao,
    "compressed-tensors": compressed_tensors,
    "ml_dtypes": ml_dtypes,
}
"""By the name under which they are installed."""


def installed_peers() -> list[Library]:
    """The peers that can be imported; says which cannot, and how to get them."""
    peers = []
    for package, load in PEERS.items():
        try:
            peers.append(load())
        except ImportError as error:
            print(f"{package} is left out: {error}. To have it: python -m pip install {package}")
    return peers


def disagreement(peer: Library, operation: str, values: Tensor) -> str:
    """How a peer's result differs from mxtorq's under the same rule; empty if no bit does."""
    expected = ours(peer.rule)
    own, theirs = (library.call(operation, values)() for library in (expected, peer))
    if operation != "quantize":
        return _differing(_bits(own), _bits(theirs), "values")
    own, theirs = expected.parts(own), peer.parts(theirs)
    differences = (
        _differing(own.e8m0, theirs.e8m0, "scale bytes"),
        _differing(_codes(own), _codes(theirs), "codes"),
    )
    return ", ".join(filter(None, differences))


def special_blocks() -> dict[str, Tensor]:
    """Blocks at the edges of the format, where libraries are known to go separate ways."""

    def block(*values: float, fill: float = 0.0) -> Tensor:
        return torch.tensor([*values, *[fill] * (BLOCK - len(values))], dtype=torch.float32)[None]

    ulp = 2.0**-21  # of a float32 between 4 and 8
    return {
        "all zero": block(),
        "-0.0 beside 4": block(4.0, -0.0, fill=1.0),
        "-0.01 beside 4": block(4.0, -0.01, fill=1.0),
        "every tie": block(4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -2.5, fill=1.0),
        "amax 6 + ulp": block(6 + ulp, fill=1.0),
        "amax 7 - ulp": block(7 - ulp, fill=1.0),
        "amax 7": block(7.0, fill=1.0),
        "amax 8 - ulp": block(8 - ulp, fill=1.0),
        "amax 2^-126": block(2.0**-126, 2.0**-127),
        "amax 2^-149": block(2.0**-149),
        "amax 1.75 x 2^127": block(1.75 * 2.0**127, fill=1.0),
        "one NaN": block(float("nan"), -2.0, fill=1.0),
        "one Inf": block(float("inf"), -2.0, fill=1.0),
    }


def special_differences(peers: list[Library]) -> list[dict[str, str]]:
    """Where peers differ from mxtorq on special blocks: one row a block and peer."""
    rows = []
    for peer in peers:
        for name, block in special_blocks().items():
            found = {
                operation: disagreement(peer, operation, block.to(dtype))
                for operation in OPERATIONS
                for dtype in [d for d in DTYPES if peer.offers(operation, d)][:1]
            }
            if any(found.values()):
                row = {"block": name, "library": peer.name, "scale_rule": peer.rule.value}
                rows.append(row | {o: found.get(o, "not offered") or "equal" for o in OPERATIONS})
    return rows


def _bits(values: Tensor) -> Tensor:
    values = values.masked_fill(values.isnan(), float("nan"))  # one pattern for every NaN
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def _codes(quantized: MXFP4) -> Tensor:
    return torch.stack((quantized.packed & 15, quantized.packed >> 4), dim=-1)


def _differing(expected: Tensor, found: Tensor, what: str) -> str:
    wrong = expected != found
    if not wrong.any():
        return ""
    if expected.numel() == 1:
        return f"{what.removesuffix('s')} {found.item()}, not {expected.item()}"
    return f"{int(wrong.sum()):,} of {wrong.numel():,} {what}"
