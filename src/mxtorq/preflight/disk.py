"""What is on disk at the worst moment of a run, from shapes alone.

A run keeps its layers and what the next layer gets in OUT.partial, and makes OUT from that at the
end: by links where it is many files, by a copy where it is one. Files of a few kilobytes and the
tokenizer are not counted.
"""

from mxtorq.export.checkpoint import SINGLE_FILE
from mxtorq.formats.spec import BLOCK
from mxtorq.preflight.job import BF16, Job
from mxtorq.reports.needs import Budget
from mxtorq.transforms.mxtorq.candidates import SIZES
from mxtorq.transforms.mxtorq.method import MXTORQ
from mxtorq.transforms.rotation import IdentityMethod

_NUMBER = 8
"""Bytes: transforms are stored in float64."""


def budget(job: Job, free: int, written: int) -> Budget:
    """What the worst moment needs of the disk that OUT is on.

    Args:
        job: what shall be done.
        free: bytes that may still be written.
        written: bytes that an earlier process has left for this run to go on with.
    """
    tensors = layers(job) + outside(job)
    kept = {"quantized layers": layers(job), "transforms": transforms(job)}
    working = kept | {"activations of two layers": 2 * job.activations}
    ending = kept | {
        "tensors outside of the layers": outside(job),
        "activations of a layer": job.activations,
        "the transforms in one file": transforms(job),
        "the checkpoint in one file": tensors if tensors <= SINGLE_FILE else 0,
    }
    name, parts = max(
        ("quantizing", working), ("making the checkpoint", ending), key=lambda p: sum(p[1].values())
    )
    parts = {part: size for part, size in parts.items() if size}
    return Budget(name="disk", phase=name, parts=parts, free=free + written)


def layers(job: Job) -> int:
    """4 1/4 bits for each quantized number, BF16 for all others."""
    each = job.quantized * 17 // 32 + BF16 * (job.layer - job.quantized)
    return job.layers * each


def outside(job: Job) -> int:
    """BF16."""
    return BF16 * sum(job.outside)


def transforms(job: Job) -> int:
    """At most about this, a matrix of 32 x 32 for each block, or as many numbers a channel as the
    budget has multiply-adds: what a method stores is known when it has chosen."""
    method = job.recipe.method
    if isinstance(method, IdentityMethod):
        return 0
    numbers = min(method.budget, max(SIZES)) + 1 if isinstance(method, MXTORQ) else BLOCK
    return job.layers * sum(_NUMBER * numbers * site.width for site in job.sites)
