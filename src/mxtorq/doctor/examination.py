"""All checks of a checkpoint in one go."""

from collections.abc import Iterator
from pathlib import Path

import torch

from mxtorq.calibration.data import evaluation_windows, load_text
from mxtorq.doctor.against import check_logits, check_weights
from mxtorq.doctor.checks import (
    Progress,
    check_decoding,
    check_files,
    check_fused,
    check_inputs,
    check_rule,
    check_scales,
    check_shapes,
    check_transforms,
    scan,
)
from mxtorq.doctor.engines import verdicts
from mxtorq.doctor.subject import Subject, open_subject
from mxtorq.loading.source import load_source
from mxtorq.models.family import Family
from mxtorq.reports.findings import Diagnosis, Finding, Status

TOKENS = 2048
"""Of the text that logits are compared on."""


def examine(
    checkpoint: Path,
    *,
    original: str | None = None,
    text: str = "stdlib",
    tokens: int = TOKENS,
    family: Family | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Diagnosis:
    """Examine a checkpoint, and compare it with the model that it was made from if that is given.

    Args:
        checkpoint: a folder of mxtorq's, compressed-tensors' or Quark's making.
        original: a folder, a hub id, or ``reference``.
        text: FILE or NAME (`calibration.data`), for the logits.
        tokens: of it.
        family: one of your own.
        progress: told how far it is.

    Raises:
        MxtorqError: it is no checkpoint that is known here, or the original cannot be read.
    """
    subject = open_subject(checkpoint)
    findings = list(_findings(subject, progress))
    if original is None:
        skipped = "pass the original model to compare weights and logits with it"
        findings.append(Finding(check="original", status=Status.SKIPPED, text=skipped))
    elif _wrong(findings, "shapes", "scales", "transforms"):
        skipped = "what is wrong above comes first"
        findings.append(Finding(check="original", status=Status.SKIPPED, text=skipped))
    else:
        source = load_source(original, torch.device("cpu"), at_rest=True, family=family)
        findings += check_weights(subject, source, progress)
        if _wrong(findings):
            skipped = "what is wrong above comes first"
            findings.append(Finding(check="logits", status=Status.SKIPPED, text=skipped))
        else:
            windows = evaluation_windows(
                load_text(text, "evaluation"),
                source.tokenizer,
                seqlen=min(512, source.longest_window(), tokens),
                tokens=tokens,
            )
            findings += check_logits(subject, source, windows.ids, progress)
    return Diagnosis(
        checkpoint=str(checkpoint),
        layout=subject.method,
        findings=tuple(findings),
        engines=verdicts(subject),
    )


def _findings(subject: Subject, progress: Progress) -> Iterator[Finding]:
    yield from check_files(subject)
    counted = scan(subject, progress)
    for check in (check_shapes, check_scales, check_decoding, check_rule):
        yield from check(subject, counted)
    yield from check_inputs(subject)
    yield from check_transforms(subject)
    yield from check_fused(subject)


def _wrong(findings: list[Finding], *checks: str) -> bool:
    """Whether one of these checks, or any, found something wrong."""
    return any(
        finding.status is Status.WRONG and (not checks or finding.check in checks)
        for finding in findings
    )
