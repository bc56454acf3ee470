"""Every Triton kernel compiles for five NVIDIA architectures and one of AMD, without a GPU, to
machine code.

The text of the assembly shows what the bits depend on: no product fused with a sum where a kernel
promises the bits of eager torch, no instruction that flushes subnormals, and the MXFP4 matrix units
where the architecture has them.
"""

import os
import re
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="needs Triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxtorq.kernels.triton import gptq, matmul, mxfp4, rotate, two_level
from mxtorq.kernels.triton.compile import OPTIONS

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting Triton compiles nothing"
)
CAPABILITIES = (80, 90, 100, 103, 120)
COUNTS = dict.fromkeys(
    ("blocks", "add", "tokens", "steps", "rows", "count", "halves", "follow_stride"), "i32"
)
BYTES = {"packed": "*u8", "scales": "*u8", "out": "*u8"}


class Variant(NamedTuple):
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    options: dict[str, int] = {}  # noqa: RUF012
    exact: bool = True
    """Promises the bits of eager torch, so that nothing may be fused."""


ROTATE = {"matrix": "*fp32", **BYTES}
CHAIN = {
    **dict.fromkeys(("planes", "touched"), "*i32"),
    **dict.fromkeys(("angles", "intra", "inter", "scratch"), "*fp32"),
    **BYTES,
}
GROUP = dict.fromkeys(("columns", "follow", "errors", "scales"), "*fp32")
PRODUCT = {
    **dict.fromkeys(("weight", "weight_scales", "tokens", "token_scales"), "*u8"),
    "bias": "*fp32",
    "out": "*i16",
}
DENSE = {"TOKENS": 4, "ROWS": 64, "INNER": 32, "INTRA": True, "FAKE": False}
TILES = {"TOKENS": 4, "TILE": 16, "INTRA": True}
ONE_WARP = {"num_warps": 1, "num_stages": 1}


def product(count: int, whole: bool) -> Variant:
    tile = {"ROWS": matmul.ROWS, "COUNT": count, "INNER": matmul.INNER, "GROUP": 8}
    constants = {**tile, "BIAS": True, "WHOLE": whole}
    return Variant(matmul.matmul_kernel, PRODUCT, constants, exact=False)


# For each architecture one variant of each kernel.
ALL = {
    "quantize": Variant(mxfp4.quantize_kernel, {"values": "*i16", **BYTES}, {"STEP": 64}),
    "fake_quantize": Variant(
        mxfp4.fake_quantize_kernel, {"values": "*i32", "out": "*i32"}, {"STEP": 64}
    ),
    "dequantize": Variant(mxfp4.dequantize_kernel, {**BYTES, "out": "*i16"}, {"STEP": 64}),
    "rotate": Variant(
        rotate.rotate_kernel,
        {"values": "*i16", **ROTATE},
        {"STEP": 64, "SUMS": "tf32x3", "FAKE": False},
        exact=False,
    ),
    "chain": Variant(
        two_level.chain_kernel,
        {"values": "*i16", **CHAIN},
        {**TILES, "SUMS": "ascending", "FAKE": False},
        ONE_WARP,
    ),
    "dense": Variant(
        two_level.dense_kernel, {"values": "*i16", **CHAIN}, {**DENSE, "SUMS": "bf16"}, exact=False
    ),
    "group": Variant(gptq.group_kernel, GROUP, {"ROWS": 32, "DYNAMIC": True}, ONE_WARP),
    "product": product(16, True),
}
# For one architecture the other types, sums and tiles too.
MORE = {
    "quantize float32": Variant(mxfp4.quantize_kernel, {"values": "*i32", **BYTES}, {"STEP": 64}),
    "quantize float16": Variant(mxfp4.quantize_kernel, {"values": "*fp16", **BYTES}, {"STEP": 64}),
    "dequantize float64": Variant(mxfp4.dequantize_kernel, {**BYTES, "out": "*fp64"}, {"STEP": 64}),
    "rotate ascending": Variant(
        rotate.rotate_kernel,
        {"values": "*i32", **ROTATE, "out": "*i16"},
        {"STEP": 64, "SUMS": "ascending", "FAKE": True},
    ),
    "rotate ieee": Variant(
        rotate.rotate_kernel,
        {"values": "*i32", **ROTATE},
        {"STEP": 64, "SUMS": "ieee", "FAKE": False},
        exact=False,
    ),
    "rotate bf16": Variant(
        rotate.rotate_kernel,
        {"values": "*i16", **ROTATE},
        {"STEP": 64, "SUMS": "bf16", "FAKE": False},
        exact=False,
    ),
    "chain tf32x3": Variant(
        two_level.chain_kernel,
        {"values": "*i32", **CHAIN, "out": "*i32"},
        {**TILES, "SUMS": "tf32x3", "FAKE": True},
        ONE_WARP,
        exact=False,
    ),
    "dense tf32x3": Variant(
        two_level.dense_kernel,
        {"values": "*i32", **CHAIN},
        {**DENSE, "SUMS": "tf32x3"},
        exact=False,
    ),
    "group given": Variant(gptq.group_kernel, GROUP, {"ROWS": 32, "DYNAMIC": False}, ONE_WARP),
    "product wide": product(128, True),
    "product ragged": product(32, False),
}
# Arguments that are 1 become constants, whose code takes other ways through the compiler.
SINGLE = {
    "quantize one block": ("quantize", ("blocks",)),
    "dequantize one block": ("dequantize", ("blocks",)),
    "fake_quantize one block": ("fake_quantize", ("blocks",)),
    "rotate one block": ("rotate", ("blocks",)),
    "chain of one rotation": ("chain", ("tokens", "steps")),
    "dense one block": ("dense", ("tokens", "blocks")),
    "group of one row": ("group", ("rows",)),
    "product one token": ("product", ("count", "steps")),
    "product one row": ("product ragged", ("rows", "blocks")),
}
for _name, (_base, _ones) in SINGLE.items():
    _variant = (ALL | MORE)[_base]
    MORE[_name] = _variant._replace(constants=_variant.constants | dict.fromkeys(_ones, 1))
JOBS = [(name, capability) for name in ALL for capability in CAPABILITIES]
JOBS += [(name, 90) for name in MORE]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """So that each run compiles, and leaves nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(variant: Variant, target: GPUTarget):
    kernel = variant.kernel
    types = {**COUNTS, **variant.types, **dict.fromkeys(variant.constants, "constexpr")}
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = [
        (index,)
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("halves", "rows")
    ]
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(kernel, signature, constexprs=variant.constants, attrs=attributes)
    options = {**OPTIONS, **variant.options}
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize(("name", "capability"), JOBS)
def test_compiles(name, capability):
    variant = (ALL | MORE)[name]
    result = compiled(variant, GPUTarget("cuda", capability, 32))
    assembly = result.asm["ptx"]
    assert result.asm["cubin"][:4] == b"\x7fELF"
    assert not result.metadata.enable_fp_fusion  # what tells the assembler not to fuse either
    assert result.metadata.shared <= 99 << 10  # what every one of these architectures has
    assert not re.search(r"\.ftz\b", assembly)
    if variant.exact:
        assert not re.search(r"\b(fma|mad)\.r[nz]\S*\.f(32|64)", assembly)
        assert not re.search(r"\bdiv\.(full|approx)", assembly)
    if name.startswith("product"):
        units = {
            80: r"mma\.sync\S*bf16",
            90: r"wgmma\.mma_async\S*bf16",
            100: r"tcgen05\.mma\S*mxf4",
            103: r"tcgen05\.mma\S*mxf4",
            120: r"mma\.sync\S*mxf4",
        }
        assert re.search(units[capability], assembly)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("rotate", "product")])
def test_compiles_for_amd(name):
    """An MI300, 64 threads a warp. Its units have no tf32x3, and Triton 3.6 no product for it."""
    result = compiled(ALL[name], GPUTarget("hip", "gfx942", 64))
    assert result.asm["hsaco"][:4] == b"\x7fELF"
    if ALL[name].exact:
        assert not re.search(r"\bv_(pk_)?(fma|fmac|mac|mad)_f32", result.asm["amdgcn"])


def test_a_fused_product_would_be_seen():
    """The check above can fail: with fusion allowed, the chain's products are fused."""
    variant = ALL["chain"]
    fused = variant._replace(options={**variant.options, "enable_fp_fusion": True})
    assert re.search(r"\bfma\.rn\.f32", compiled(fused, GPUTarget("cuda", 90, 32)).asm["ptx"])
