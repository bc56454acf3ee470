"""A checkpoint against the model that it was made from: weight by weight, then logits.

Weights can be compared where the checkpoint says which transform stands between (or none) and the
rest of the model is the original's. A block whose codes fit the original far better under the next
scale, or with the elements of each pair exchanged, is what a wrong exponent or another order of
nibbles leaves.

Logits are compared on a text. How far is too far is measured too: direct rounding of the original
under the same scale rule, which every method is meant to beat, is the yardstick.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from mxtorq.calibration.capture import batches
from mxtorq.doctor.checks import Progress
from mxtorq.doctor.subject import Subject
from mxtorq.export.carried import stored_transform
from mxtorq.formats import mxfp4
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.formats.mxfp4 import MXFP4
from mxtorq.formats.spec import BLOCK
from mxtorq.kernels.dispatch import dequantize
from mxtorq.loading.at_rest import stored_value
from mxtorq.loading.checkpoint import load_checkpoint
from mxtorq.loading.skeleton import empty_model, fill_, stored_names
from mxtorq.loading.source import Source, place
from mxtorq.models.family import Family
from mxtorq.reports.findings import Finding, Status
from mxtorq.surgery.linear import MXFP4Linear, linear_at
from mxtorq.transforms.base import Transform
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.hadamard import sylvester
from mxtorq.transforms.rotation import Identity

FAR = 0.2
"""A linear whose relative squared error is above this holds other weights. Direct rounding of a
Gaussian leaves .013; exchanged pairs leave 2, a scale off by one 1 or a quarter."""

BEYOND = 3.0
"""How many times the KL of direct rounding a checkpoint may be away from the original."""

_ROWS = 256


@dataclass(eq=False)
class _Fit:
    """How far a linear is from the original, and what would bring it nearer."""

    error: float = 0.0
    energy: float = 0.0
    exchanged: float = 0.0
    shifted: int = 0
    """Blocks that fit far better with the next scale up or down."""

    @property
    def relative(self) -> float:
        return self.error / self.energy if self.energy else 0.0


def check_weights(subject: Subject, source: Source, progress: Progress) -> Iterator[Finding]:
    """Each quantized weight is that of the original, in the coordinates that it should be in."""
    reason = _incomparable(subject, source)
    if reason:
        yield Finding(check="weights", status=Status.SKIPPED, text=reason)
        return
    transforms = _transforms(subject)
    worst, told = 0.0, 0
    for done, (name, linear) in enumerate(subject.linears.items()):
        progress("compare weights", done, len(subject.linears))
        assert linear.scale is not None
        codes = MXFP4(subject.tensors.tensor(linear.packed), subject.tensors.tensor(linear.scale))
        original = stored_value(source, f"{name}.weight")
        transform = transforms.get(name, Identity(original.shape[1]))
        fit = _fit(codes, original, transform)
        worst = max(worst, fit.relative)
        text = _diagnosis(name, fit, transform)
        if text and told < 3:
            told += 1
            yield Finding(check="weights", status=Status.WRONG, text=text)
    progress("compare weights", len(subject.linears), len(subject.linears))
    if not told:
        text = f"all are the original's, relative squared error {worst:.3f} at most"
        yield Finding(check="weights", status=Status.OK, text=text)


@torch.no_grad()
def check_logits(
    subject: Subject, source: Source, windows: Int64[Tensor, "n seqlen"], progress: Progress
) -> Iterator[Finding]:
    """The predictions are as near to the original's as those of a sound checkpoint."""
    rule = subject.input_rule
    quantized, direct = runnable(subject, source.family), _direct(source, rule)
    plain = _plain(source)
    far = {"checkpoint": 0.0, "direct": 0.0}
    largest, count = 0.0, 0
    for done, batch in enumerate(batches(windows)):
        progress("compare logits", done, len(batches(windows)))
        truth = _logits(plain, batch).log_softmax(-1)
        for what, model in (("checkpoint", quantized), ("direct", direct)):
            scores = _logits(model, batch).log_softmax(-1)
            far[what] += (truth.exp() * (truth - scores)).sum().item()
            if what == "checkpoint":
                largest = max(largest, (truth - scores).abs().max().item())
        count += batch.numel()
    progress("compare logits", len(batches(windows)), len(batches(windows)))
    mine, yardstick = far["checkpoint"] / count, far["direct"] / count
    text = (
        f"KL from the original {mine:.4f} nats a token over {count} tokens (log-probabilities "
        f"differ by up to {largest:.2f}); direct rounding under {rule.value}: {yardstick:.4f}"
    )
    if mine <= BEYOND * yardstick:
        yield Finding(check="logits", status=Status.OK, text=text)
        return
    text += (
        f". More than {BEYOND:g} times direct rounding: it does not compute the original's "
        "function. A rotation that is not undone (of weights, inputs or a bias) looks like this"
    )
    yield Finding(check="logits", status=Status.WRONG, text=text)


def runnable(subject: Subject, family: Family) -> nn.Module:
    """The model of a checkpoint as W4A4, on the CPU in float32, with every transform in place."""
    if subject.manifest is not None:
        return load_checkpoint(subject.folder, torch.device("cpu"), family)[0].model
    model = empty_model(subject.config, family)
    transforms, rule = _transforms(subject), subject.input_rule
    for name, stored in subject.linears.items():
        assert stored.scale is not None
        codes = MXFP4(subject.tensors.tensor(stored.packed), subject.tensors.tensor(stored.scale))
        there = f"{name}.bias" in subject.tensors.entries
        bias = subject.tensors.tensor(f"{name}.bias") if there else None
        transform = transforms.get(name, Identity(linear_at(model, name).in_features))
        model.set_submodule(name, MXFP4Linear(codes, bias, transform, rule))
    plain = [n for n in stored_names(model, family) if n in subject.tensors.entries]
    fill_(model, plain, lambda name: subject.tensors.tensor(name).bfloat16())
    model.tie_weights()  # type: ignore[operator]
    return place(model, torch.device("cpu"))


def _incomparable(subject: Subject, source: Source) -> str | None:
    """Why the weights cannot be compared one by one, if they cannot."""
    names = [n for n in stored_names(source.model, source.family) if n in subject.tensors.entries]
    for name in names:
        stored, original = subject.tensors.tensor(name), stored_value(source, name)
        if stored.shape != original.shape:
            return f"{name} has another shape than the original's: it is of another model"
        if not torch.equal(stored.bfloat16(), original):
            return f"{name} differs from the original's: something was merged into the model"
    return None


def _transforms(subject: Subject) -> dict[str, Transform]:
    """The online transform of each linear that has one."""
    found: dict[str, Transform] = {}
    for site in subject.manifest.sites if subject.manifest is not None else ():
        if site.kind != "identity":
            transform = stored_transform(site, subject.tensors, subject.transforms)
            found.update(dict.fromkeys(site.linears, transform))
    for group in () if subject.manifest is not None else subject.groups:
        if group.matrix is not None:
            matrix = subject.tensors.tensor(group.matrix).double()
            matrix = matrix / len(matrix) ** 0.5
        else:  # made from its size
            matrix = sylvester(group.size or BLOCK)
        for name in group.linears:
            width = 2 * subject.entry(subject.linears[name].packed).shape[1]
            found[name] = BlockMatrices(matrix.expand(width // len(matrix), -1, -1).contiguous())
    return found


def _fit(codes: MXFP4, original: Tensor, transform: Transform) -> _Fit:
    fit = _Fit()
    for start in range(0, len(original), _ROWS):
        here = slice(start, start + _ROWS)
        expected = transform.fuse(original[here].double()).unflatten(-1, (-1, BLOCK))
        values = dequantize(MXFP4(codes.packed[here], codes.e8m0[here]), torch.float32)
        blocks = values.double().unflatten(-1, (-1, BLOCK))
        pairs = blocks.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        own = (blocks - expected).square().sum(-1)
        others = [(blocks * by - expected).square().sum(-1) for by in (0.5, 2.0)]
        fit.error += own.sum().item()
        fit.energy += expected.square().sum().item()
        fit.exchanged += (pairs - expected).square().sum().item()
        fit.shifted += int((torch.minimum(*others) * 4 < own).sum())
    return fit


def _diagnosis(name: str, fit: _Fit, transform: Transform) -> str | None:
    if fit.relative > FAR and fit.exchanged < FAR * fit.energy:
        return f"{name}: right once the elements of each byte change places: swapped nibbles"
    if fit.shifted:
        return f"{name}: {fit.shifted} blocks are right with the next scale: exponents off by one"
    if fit.relative > FAR:
        there = "without a rotation" if transform.kind == "identity" else "after its rotation"
        return (
            f"{name}: relative squared error {fit.relative:.2f} {there}: other weights, or another "
            "rotation than the checkpoint says"
        )
    return None


def _direct(source: Source, rule: ScaleRule) -> nn.Module:
    """The original rounded directly."""
    model = _plain(source)
    family = source.family
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for site in family.sites:
            for path in site.linears:
                linear = linear_at(layer, path)
                if linear.in_features % BLOCK == 0:
                    name = family.linear_name(index, path)
                    codes = mxfp4.quantize(linear.weight.float(), rule)
                    same = Identity(linear.in_features)
                    model.set_submodule(name, MXFP4Linear(codes, linear.bias, same, rule))
    return model


def _plain(source: Source) -> nn.Module:
    """The original in memory, in float32."""
    config: Any = source.config
    model = empty_model(config.to_dict(), source.family)
    fill_(model, stored_names(model, source.family), lambda name: stored_value(source, name))
    model.tie_weights()  # type: ignore[operator]
    return place(model, torch.device("cpu"))


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits.double()
