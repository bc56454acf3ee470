"""The checks: from a checkpoint to findings. None of them needs the original model.

`scan` reads every quantized weight once, in chunks of rows, and the checks look at what it counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mxtorq.doctor.subject import QuantizedLinear, Subject
from mxtorq.errors import MxtorqError
from mxtorq.export.carried import stored_transform
from mxtorq.export.checkpoint import read_manifest
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.spec import BLOCK, E2M1_MAGNITUDES, E8M0_NAN
from mxtorq.kernels.dispatch import dequantize
from mxtorq.reports.findings import Finding, Status

Progress = Callable[[str, int, int], None]

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that engines multiply as one, by the last part of their names."""

LARGEST_CODES = {
    ScaleRule.FLOOR: (6, 7),
    ScaleRule.EVEN: (6, 7),
    ScaleRule.UOS: (6, 7),
    ScaleRule.RCEIL: (5, 6, 7),
    ScaleRule.CEIL: (4, 5, 6),
    ScaleRule.FLOOR6: (7,),
}
"""The codes that a block's largest magnitude can get: its interval over the scale (see the cards of
`ScaleRule`), rounded. (3.5, 4] is 4, and so is the tie 3.5."""

_ROWS = 256


@dataclass(eq=False)
class Scan:
    """What was counted in all quantized weights."""

    blocks: int = 0
    largest: Counter[int] = field(default_factory=Counter)
    """Blocks that are not zero, by the code of their largest magnitude."""
    nan: Counter[str] = field(default_factory=Counter)
    """Blocks with the scale byte 255, by linear."""
    fractional: Counter[str] = field(default_factory=Counter)
    """Scales that are stored as numbers and are no powers of two, by linear."""
    misshapen: dict[str, str] = field(default_factory=dict)
    """Linears whose two tensors do not belong together."""
    differing: list[str] = field(default_factory=list)
    """Linears that a second decoder reads otherwise."""


def scan(subject: Subject, progress: Progress) -> Scan:
    """Read every quantized weight once."""
    found = Scan()
    for done, (name, linear) in enumerate(subject.linears.items()):
        progress("read", done, len(subject.linears))
        wrong = _shape(subject, linear)
        if wrong is not None:
            found.misshapen[name] = wrong
            continue
        assert linear.scale is not None
        packed = subject.tensors.tensor(linear.packed)
        scale = subject.tensors.tensor(linear.scale)
        if scale.is_floating_point():
            found.fractional[name] += int((scale.double().frexp().mantissa != 0.5).sum())
            continue
        found.blocks += scale.numel()
        found.nan[name] += int((scale == E8M0_NAN).sum())
        for start in range(0, len(packed), _ROWS):
            codes = MXFP4(packed[start : start + _ROWS], scale[start : start + _ROWS])
            largest, used = _magnitudes(codes.packed)[codes.e8m0 > 0].unique(return_counts=True)
            found.largest.update(dict(zip(largest.tolist(), used.tolist(), strict=True)))
            if not _decoded_alike(codes) and name not in found.differing:
                found.differing.append(name)
    progress("read", len(subject.linears), len(subject.linears))
    return found


def check_files(subject: Subject) -> Iterator[Finding]:
    """Every file is what the manifest says; without one, as long as its header says."""
    if subject.manifest is None:
        text = f"{len(subject.tensors.files)} tensor files, as long as their headers say; no hashes"
        yield Finding(check="files", status=Status.NOTE, text=text)
        return
    try:
        read_manifest(subject.folder)
    except MxtorqError as error:
        yield Finding(check="files", status=Status.WRONG, text=f"{error.asked}: {error.found}")
        return
    text = f"{len(subject.manifest.files)} files have the hashes of the manifest"
    yield Finding(check="files", status=Status.OK, text=text)


def check_shapes(subject: Subject, scan: Scan) -> Iterator[Finding]:
    """Each linear has codes and scales of one shape."""
    for name, wrong in list(scan.misshapen.items())[:3]:
        yield Finding(check="shapes", status=Status.WRONG, text=f"{name}: {wrong}")
    if not subject.linears:
        yield Finding(check="shapes", status=Status.WRONG, text="no quantized linear at all")
    elif not scan.misshapen:
        text = f"{len(subject.linears)} linears with two codes a byte and a scale for {BLOCK}"
        yield Finding(check="shapes", status=Status.OK, text=text)


def check_scales(subject: Subject, scan: Scan) -> Iterator[Finding]:
    """Scales are legal E8M0: bytes, none of them NaN."""
    for name, count in list((+scan.fractional).items())[:3]:
        text = (
            f"{name}: {count} scales are no powers of two: no MXFP4 hardware can multiply by them"
        )
        yield Finding(check="scales", status=Status.WRONG, text=text)
    if scan.fractional and not +scan.fractional:
        text = "scales are stored as numbers in place of E8M0 bytes; all are powers of two"
        yield Finding(check="scales", status=Status.WRONG, text=text)
    for name, count in list((+scan.nan).items())[:3]:
        text = f"{name}: {count} scale bytes are 255, which is NaN (OCP MX 5.4.1)"
        yield Finding(check="scales", status=Status.WRONG, text=text)
    if scan.blocks and not +scan.nan:
        yield Finding(check="scales", status=Status.OK, text=f"{scan.blocks:,} legal E8M0 bytes")


def check_decoding(subject: Subject, scan: Scan) -> Iterator[Finding]:
    """A decoder that shares nothing with ours reads the same values."""
    if scan.differing:
        text = f"{scan.differing[0]} is decoded otherwise by a second decoder"
        yield Finding(check="decoding", status=Status.WRONG, text=text)
    elif scan.blocks:
        text = "a table and a power of two give our kernels' values to the bit"
        yield Finding(check="decoding", status=Status.OK, text=text)


def check_rule(subject: Subject, scan: Scan) -> Iterator[Finding]:
    """Which scale rules the weights can have been made with."""
    total = sum(scan.largest.values())
    if not total:
        return
    shares = {
        rule: sum(scan.largest[code] for code in codes) / total
        for rule, codes in LARGEST_CODES.items()
    }
    fitting = [rule.value for rule, share in shares.items() if share == 1]
    most = max(shares.values())
    nearly = [f"{rule.value} {share:.2%}" for rule, share in shares.items() if share == most]
    told = "" if subject.manifest is None else subject.manifest.scale_rules["weights"]
    text = (
        f"weights: the largest codes of all blocks fit {', '.join(fitting)}"
        if fitting
        else f"weights: the largest codes fit {', '.join(nearly)} of all blocks; a search or GPTQ "
        "leaves such traces"
    )
    if told:
        text += f"; the manifest says {told}"
    yield Finding(check="scale rule", status=Status.OK, text=text)


def check_inputs(subject: Subject) -> Iterator[Finding]:
    """Whether inputs are meant to be rounded."""
    if subject.weights_only:
        text = (
            "the configuration does not round them: a W4A16 checkpoint. Logits are compared as "
            "W4A4 all the same, as vLLM runs it on Blackwell"
        )
        yield Finding(check="inputs", status=Status.NOTE, text=text)


def check_transforms(subject: Subject) -> Iterator[Finding]:
    """Every transform is there, whole, and will be applied somewhere."""
    yield from _own_transforms(subject)
    yield from _stock_transforms(subject)
    if not subject.rotated:
        text = "nothing has to be transformed online (merged rotations cannot be told from weights)"
        yield Finding(check="transforms", status=Status.OK, text=text)


def check_fused(subject: Subject) -> Iterator[Finding]:
    """Linears that engines multiply as one are quantized alike and share their transforms."""
    broken = []
    parents = {name.rpartition(".")[0] for name in subject.linears}
    for parent in sorted(parents):
        for leaves in FUSED:
            names = [f"{parent}.{leaf}" for leaf in leaves]
            quantized = [name for name in names if name in subject.linears]
            plain = [name for name in names if f"{name}.weight" in subject.tensors.entries]
            if quantized and set(plain) - set(quantized):
                broken.append(f"{', '.join(quantized)} without the others of {parent}")
            acting = [[g.name for g in subject.groups if name in g.linears] for name in quantized]
            if any(groups != acting[0] for groups in acting):
                told = ", ".join(f"{n}: {g}" for n, g in zip(quantized, acting, strict=True))
                broken.append(f"different groups of transform_config act on them: {told}")
    for site in subject.manifest.sites if subject.manifest else ():
        found = {name.rpartition(".")[2] for name in site.linears}
        for leaves in FUSED:
            if found & set(leaves) and not found.issuperset(leaves):
                broken.append(f"{site.site} transforms {', '.join(sorted(found))} alone")
    for text in broken[:3]:
        yield Finding(check="fused groups", status=Status.WRONG, text=text)
    if not broken:
        text = "q, k and v, and gate and up, are quantized and transformed together"
        yield Finding(check="fused groups", status=Status.OK, text=text)


def _own_transforms(subject: Subject) -> Iterator[Finding]:
    if subject.manifest is None:
        return
    kinds: Counter[str] = Counter()
    stored = set() if subject.transforms is None else set(subject.transforms.names)
    for site in subject.manifest.sites:
        if site.kind == "identity":
            continue
        kinds[site.kind] += 1
        parts = {} if subject.transforms is None else subject.transforms.below(site.site)
        stored -= {f"{site.site}.{name}" for name in parts}
        try:
            stored_transform(site, subject.tensors, subject.transforms)
        except Exception as error:  # damaged data can fail anywhere
            text = f"{site.site}: its transform ({site.kind}) is missing or not whole: {error}"
            yield Finding(check="transforms", status=Status.WRONG, text=text[:300])
            return
    if stored:
        text = f"{sorted(stored)[0]} belongs to no site: its rotation would not be applied"
        yield Finding(check="transforms", status=Status.WRONG, text=text)
    elif kinds:
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        text = f"{listed}, whole, applied online before the linears of their sites"
        yield Finding(check="transforms", status=Status.OK, text=text)


def _stock_transforms(subject: Subject) -> Iterator[Finding]:
    named = {group.matrix for group in subject.groups}
    stray = [
        name
        for name in subject.tensors.names
        if name.endswith("_input.weight") and name not in named
    ]
    for name in stray[:3]:
        text = f"{name} belongs to no group of transform_config: it would not be applied"
        yield Finding(check="transforms", status=Status.WRONG, text=text)
    sound = 0
    for group in subject.groups:
        wrong = _group_fault(subject, group.matrix, group.size, group.kind, group.linears)
        if wrong:
            text = f"group {group.name}: {wrong}"
            yield Finding(check="transforms", status=Status.WRONG, text=text)
        else:
            sound += 1
    if sound and sound == len(subject.groups) and not stray:
        text = f"{sound} groups of transform_config with their matrices, applied online to inputs"
        yield Finding(check="transforms", status=Status.OK, text=text)


def _group_fault(
    subject: Subject, matrix: str | None, size: int | None, kind: str, linears: tuple[str, ...]
) -> str | None:
    if not linears:
        return "it targets no quantized linear: its rotation would not be applied"
    if kind == "random-matrix":
        return (
            "random-matrix: vLLM divides the matrix by the root of its size, the library does not"
        )
    if kind == "hadamard":
        return None  # made from its size alone
    if matrix is None:
        return "its matrix is missing: the rotation would be dropped or random"
    shape = subject.entry(matrix).shape
    if len(shape) != 2 or shape[0] != shape[1] or (size is not None and shape[0] != size):
        return f"a matrix {shape} where head_dim is {size}"
    values = subject.tensors.tensor(matrix).double() / shape[0] ** 0.5
    spectrum = torch.linalg.svdvals(values)
    if not bool(torch.isfinite(values).all()) or spectrum[-1] < 1e-6 * spectrum[0]:
        return "a matrix that has no inverse"
    return None


def _shape(subject: Subject, linear: QuantizedLinear) -> str | None:
    packed = subject.entry(linear.packed)
    if linear.scale is None:
        return "codes without scales"
    scale = subject.entry(linear.scale)
    if packed.dtype != torch.uint8 or len(packed.shape) != 2 or len(scale.shape) != 2:
        return f"codes {packed.dtype} {packed.shape}, scales {scale.dtype} {scale.shape}"
    rows, half = packed.shape
    if scale.shape != (rows, 2 * half // BLOCK):
        return f"codes {packed.shape} and scales {scale.shape}: not one scale for {BLOCK} weights"
    if scale.dtype != torch.uint8 and not scale.dtype.is_floating_point:
        return f"scales of type {scale.dtype}"
    return None


def _magnitudes(packed: Tensor) -> Tensor:
    """The largest magnitude code of each block [rows, blocks]."""
    pairs = torch.maximum(packed & 7, (packed >> 4) & 7)
    return pairs.view(len(packed), -1, BLOCK // 2).amax(-1)


def _decoded_alike(codes: MXFP4) -> bool:
    """Whether NumPy, with a table and ldexp in float64, reads what our kernels read."""
    table = np.array([*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)])
    packed = codes.packed.numpy()
    values = np.empty((packed.shape[0], 2 * packed.shape[1]))
    values[:, 0::2], values[:, 1::2] = table[packed & 15], table[packed >> 4]
    exponents = codes.e8m0.numpy().astype(np.int32) - 127
    spread = np.repeat(exponents, BLOCK, axis=1)
    expected = np.where(spread == E8M0_NAN - 127, np.nan, np.ldexp(values, spread))
    found = dequantize(codes, torch.float32).numpy().astype(np.float64)
    # float32 holds every value but those below its least subnormal.
    return np.array_equal(found, expected.astype(np.float32).astype(np.float64), equal_nan=True)
