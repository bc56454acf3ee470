"""What each engine makes of a checkpoint: W4A4, W4A16, a refusal, or something else than it is.

Facts about engines, as read in their sources (vLLM 0.33, transformers 5.23 with compressed-tensors
0.20, SGLang 0.5.23) and partly run; a verdict is a function of what a checkpoint has.
"""

from collections.abc import Callable

from mxtorq.doctor.subject import Subject
from mxtorq.export.compressed_tensors import OWN
from mxtorq.export.packed import QUARK
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.reports.findings import Verdict

_DROPPED = "transform_config is not read: the rotation would be dropped in silence"


def verdicts(subject: Subject) -> tuple[Verdict, ...]:
    """One for each engine."""
    return tuple(
        Verdict(engine=name, runs_as=runs_as, why=why)
        for name, judge in ENGINES.items()
        for runs_as, why in [judge(subject)]
    )


def _mxtorq(subject: Subject) -> tuple[str, str]:
    if subject.manifest is not None:
        return "W4A4", f"activations under {subject.input_rule.value}"
    return "refused", "mxtorq.load reads checkpoints with a manifest of its own"


def _adapter(subject: Subject) -> tuple[str, str]:
    return _mxtorq(subject) if subject.hidden else _transformers(subject)


def _transformers(subject: Subject) -> tuple[str, str]:
    if subject.hidden:
        return "refused", "the tensors stand under a name that it does not look for"
    if subject.method == QUARK:
        return "W4A4", "through amd-quark's importer"
    if subject.groups:
        return "WRONG", _DROPPED
    if subject.weights_only:
        return "W4A16", "inputs are not rounded, as the configuration says"
    told = "compressed-tensors rounds activations under even, on any device"
    return "W4A4", told + _mismatch(subject, ScaleRule.EVEN)


def _mismatch(subject: Subject, rule: ScaleRule | None) -> str:
    """What to say of an engine that rounds activations by another rule than the checkpoint."""
    if rule is None or subject.manifest is None or rule == subject.input_rule:
        return ""
    return (
        f"; it was made for {subject.input_rule.value} "
        "(mxtorq evaluate --targets measures the difference)"
    )


def _vllm(
    kernel: str, runs_as: str, rule: ScaleRule | None = None
) -> Callable[[Subject], tuple[str, str]]:
    def judge(subject: Subject) -> tuple[str, str]:
        if subject.method == OWN:
            return "refused", "quant_method mxtorq needs the plugin"
        if subject.groups and _biased(subject):
            return "refused", "vLLM asserts that linears with an online transform have no bias"
        if subject.weights_only and runs_as == "W4A4":
            return runs_as, f"{kernel}, though the configuration rounds none (vllm#56770)"
        note = "; tensor parallelism of rotated linears is refused" if subject.groups else ""
        return runs_as, kernel + note + _mismatch(subject, rule)

    return judge


def _plugin(subject: Subject) -> tuple[str, str]:
    if subject.manifest is not None and any(s.experts for s in subject.manifest.sites):
        return "refused", "the plugin serves no experts"
    if subject.groups and subject.manifest is None:
        return "W4A4", "by vLLM's own transform_config; on CPUs activations under even"
    own = "" if subject.method == OWN else "; below SM100 with --quantization mxtorq"
    return (
        "W4A4",
        f"activations under {subject.input_rule.value}, on CPUs and on GPUs from SM80{own}",
    )


def _sglang(subject: Subject) -> tuple[str, str]:
    if subject.method == QUARK and not subject.rotated:
        return "W4A4", "on ROCm gfx95 alone"
    return "refused", "dense MXFP4 W4A4 is read from Quark's layout alone, without online rotations"


def _biased(subject: Subject) -> bool:
    rotated = {name for group in subject.groups for name in group.linears}
    return any(f"{name}.bias" in subject.tensors.entries for name in rotated)


ENGINES: dict[str, Callable[[Subject], tuple[str, str]]] = {
    "mxtorq": _mxtorq,
    "transformers": _transformers,
    "transformers + mxtorq": _adapter,
    "vllm-blackwell": _vllm("FlashInfer, activations under rceil", "W4A4", ScaleRule.RCEIL),
    "vllm-hopper": _vllm("Marlin below SM100: activations stay in BF16, one warning line", "W4A16"),
    "vllm-emulation": _vllm(
        "--linear-backend emulation needs amd-quark; even", "W4A4", ScaleRule.EVEN
    ),
    "vllm-rocm": _vllm("AITER on gfx950, its own rounding of scales", "W4A4"),
    "vllm-cpu": lambda subject: ("refused", "no MXFP4 kernel for linears without the plugin"),
    "vllm + mxtorq": _plugin,
    "sglang": _sglang,
}
"""By the name that ``--engine`` takes."""
