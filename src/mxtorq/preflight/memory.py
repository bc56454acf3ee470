"""What is in memory at the worst moment of each part of a run, from shapes alone.

Each part has a function of its own, with its formula. A phase is what is alive at one time, so the
need of a run is that of its worst phase, not the sum of everything. Where an accelerator computes,
what is computed with lies on the device, and the host holds the rest.

These are the buffers that are as large as weights, activations or Hessians; what is smaller is not
counted. n is the numbers of the weights that a site rounds as one matrix, d its width, l the
numbers of its largest linear.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mxtorq.calibration.gradients import BATCHES
from mxtorq.preflight.job import BF16, Job, SiteSizes
from mxtorq.reports.needs import Budget
from mxtorq.rounding.correction import CORRECTION_BLOCK
from mxtorq.transforms.mxtorq.loss import GRADIENTS

_DOUBLE, _FLOAT = 8, 4
_READING = 2**22 * 12
"""Bytes of what is read and looked at together: see `loading.at_rest`."""
_CHUNK = 2**24
"""Weights that GPTQ rounds together at most, with 12 bytes of errors, moves and codes each."""
_LATER = 300 * 10**6
"""What libraries still grow by: a compiler, compiled kernels, threads, what an allocator keeps."""
_PANEL = 512  # rows of a Hessian that are summed up at once


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What is alive at one time."""

    name: str
    compute: dict[str, int] = field(default_factory=dict)
    """Bytes where it computes, by part."""
    host: dict[str, int] = field(default_factory=dict)
    """Bytes beside the processor, by part."""


def budgets(
    job: Job, resident: int, free: int, free_device: int | None, keep_activations: bool
) -> list[Budget]:
    """What the worst phase needs of the memory, and of the device's own if it has some.

    Args:
        job: what shall be done.
        resident: bytes that the process has already.
        free: bytes that it may still take.
        free_device: likewise on the accelerator.
        keep_activations: whether all activations stay in memory.
    """
    every = phases(job, keep_activations)
    # A model that is in memory by now is among what the process has.
    loaded = whole_model(job) if job.in_memory else 0
    libraries = {
        "libraries and text": _LATER + max(0, resident - (loaded if free_device is None else 0))
    }
    if free_device is None:
        found = [Phase(name=p.name, host=libraries | _sum(p.compute, p.host)) for p in every]
        return [_worst("memory", found, free + resident)]
    on_device = [Phase(name=phase.name, host=phase.compute) for phase in every]
    beside = [Phase(name=phase.name, host=libraries | phase.host) for phase in every]
    return [
        _worst("device memory", on_device, free_device + loaded),
        _worst("memory", beside, free + resident),
    ]


def phases(job: Job, keep_activations: bool) -> list[Phase]:
    """What is alive when, from the first to the last phase of a run."""
    model = {"the whole model": whole_model(job)} if job.whole else {}
    layers = model or {"the layer worked on and the next": 2 * layer(job)}
    kept = {"activations": job.activations} if keep_activations else {}
    batch = {} if keep_activations else {"activations of a batch": one_batch(job)}
    every = [
        Phase(
            name="loading",
            compute=model,
            host={}
            if not job.whole or job.in_memory
            else {"a tensor while it is read": reads(job)}
            | ({"the model in BF16": BF16 * job.total} if job.size == BF16 else {}),
        ),
        Phase(
            name="the embedding",
            compute=model | {"the embedding": embedding(job)} | (kept or batch),
            host={} if job.whole else {"a tensor while it is read": _READING},
        ),
        Phase(
            name="gradients of a layer",
            compute=layers
            | kept
            | batch
            | {"gradients": gradients(job), "a backward pass": backward(job)},
        ),
        Phase(
            name="calibrating a layer",
            compute=layers
            | kept
            | batch
            | {"a forward pass": forward(job) + widened(job) + products(job)}
            | {"second moments": moments(job), "gradients": gradients(job)},
            host={} if job.whole else {"a tensor while it is read": reads(job)},
        ),
        Phase(
            name="fitting a layer",
            compute=layers
            | kept
            | {"second moments": moments(job), "gradients": gradients(job)}
            | {"choosing a transform": worst_site(job, lambda site: fitting(job, site))},
        ),
        Phase(
            name="moments of rounded inputs",
            compute=layers
            | kept
            | batch
            | {"a forward pass": forward(job) + widened(job) + both_inputs(job)}
            | {"second moments": moments(job)},
        ),
        Phase(
            name="rounding a layer",
            compute=layers
            | kept
            | {"second moments": moments(job), "those of experts": expert_moments(job)}
            | {"rounding a site": worst_site(job, lambda site: rounding(job, site))},
        ),
        Phase(
            name="running the quantized layer",
            compute=layers
            | kept
            | batch
            | {"second moments": moments(job), "those of experts": expert_moments(job)}
            | {"a forward pass": forward(job) + dequantized(job)},
        ),
        Phase(
            name="writing",
            compute=model,
            host={"tensors outside of the layers": outside(job)},
        ),
        Phase(
            name="reading back",
            compute=model | {"a layer": packed(job), "a forward pass": forward(job)},
            host={"a tensor while it is read": _READING},
        ),
    ]
    return [_without_zeros(phase) for phase in every]


def whole_model(job: Job) -> int:
    """Every number in the dtype that it computes in."""
    return job.size * job.total


def layer(job: Job) -> int:
    """A decoder layer as it waits for its turn: linears in BF16, all else as it computes."""
    return BF16 * job.quantized + job.size * (job.layer - job.quantized)


def widened(job: Job) -> int:
    """The largest weight in the dtype of a product, where it is stored in another."""
    largest = max((site.largest for site in job.sites), default=0)
    return 0 if job.whole or job.size == BF16 else job.size * largest


def packed(job: Job) -> int:
    """A quantized layer, and its largest weight dequantized for a product: 17/32 bytes a number."""
    return job.quantized * 17 // 32 + dequantized(job)


def reads(job: Job) -> int:
    """A tensor between disk and layer: some rows at a time; as a whole where it changes device."""
    largest = max((site.largest for site in job.sites), default=0)
    return _READING + (0 if job.size == _FLOAT and not job.whole else BF16 * largest)


def embedding(job: Job) -> int:
    """The embedding in BF16; it stays in the model that is in memory as a whole."""
    return 0 if job.whole else BF16 * job.embedding


def outside(job: Job) -> int:
    """The largest tensor outside of the layers, in BF16."""
    return BF16 * max(job.outside) + _READING


def one_batch(job: Job) -> int:
    """What a layer gets and what it gives, of one batch."""
    return 2 * job.batch * job.hidden * job.size


def forward(job: Job) -> int:
    """A layer's intermediate results for one batch: four of the width of the residual stream, and
    six of attention's width (q, k, v, and turned by their positions) or three of the MLP's."""
    inside = max(6 * job.attention, 3 * job.mlp)
    return job.batch * job.size * (4 * job.hidden + inside)


def products(job: Job) -> int:
    """What one summand of a Hessian takes: inputs in float32, and a panel of 512 rows of it."""
    width = _widest(job)
    copies = 0 if job.size == _FLOAT else _FLOAT * job.batch * width
    return (copies + _FLOAT * _PANEL * width) if job.hessians else 0


def both_inputs(job: Job) -> int:
    """A batch of a site's transformed inputs in float32, the same rounded, and their magnitudes,
    where a rounding asks for moments of rounded inputs."""
    rounding = job.recipe.rounding
    asked = rounding.sees_rounded_inputs or rounding.corrects_inputs
    return 3 * _FLOAT * job.batch * _widest(job) if asked else 0


def dequantized(job: Job) -> int:
    """The largest weight out of its codes, and one batch of transformed inputs in float32."""
    largest = max((site.largest for site in job.sites), default=0)
    return job.size * largest + _FLOAT * job.batch * _widest(job)


def moments(job: Job) -> int:
    """The Hessian of each site of a layer: 8 d^2. A method that chooses has one of the text that
    it fits to and one of the text that it judges by. A rounding that corrects weights for what it
    does to inputs has two moments more within blocks of 256 channels."""
    if not job.hessians:
        return 0
    each = 2 if job.recipe.method.chooses else 1
    pairs = 2 if job.recipe.rounding.corrects_inputs else 0
    return _DOUBLE * sum(
        site.width * (each * site.width + pairs * min(CORRECTION_BLOCK, site.width))
        for site in job.sites
    )


def gradients(job: Job) -> int:
    """For a method that chooses, the gradients at each site's inputs of some batches, in float32:
    a row of each token, or of each that goes to an expert; and some of those held out."""
    if not job.recipe.method.chooses:
        return 0
    tokens = min(BATCHES * job.batch, job.tokens)
    return _FLOAT * sum((tokens * site.passes + GRADIENTS) * site.width for site in job.sites)


def backward(job: Job) -> int:
    """What a layer keeps of one batch for its gradients: twice what a forward pass has at a time,
    the inputs of each product, and every weight in the dtype of the products."""
    if not job.recipe.method.chooses:
        return 0
    inputs = job.size * job.batch * sum(site.width * site.passes for site in job.sites)
    widened = 0 if job.whole or job.size == BF16 else job.size * job.quantized
    return 2 * forward(job) + 2 * inputs + widened


def expert_moments(job: Job) -> int:
    """What a rounding that looks at an expert's own tokens takes: the inputs of all experts, and
    one Hessian at a time, 8 d^2."""
    if not job.recipe.rounding.compensates:
        return 0
    widths = [site.width for site in job.sites if site.experts]
    inputs = job.size * job.tokens * job.hidden
    return inputs + _DOUBLE * max(widths) ** 2 if widths else 0


def fitting(job: Job, site: SiteSizes) -> int:
    """For a method that reads them, a site's weights in float64, 8 n for all experts, and a
    Hessian, 8 d^2. What a method takes beside that is its own affair."""
    method = job.recipe.method
    weights = _DOUBLE * site.groups * site.stacked if method.needs_weights else 0
    return weights + (_DOUBLE * site.width**2 if method.needs_hessian else 0)


def rounding(job: Job, site: SiteSizes) -> int:
    """The stacked weights in float32, 4 n, and their codes, 17/32 n. With a Hessian, which becomes
    its own Cholesky factor, one triangle of it, 4.2 d^2, and what moves weights, 4 d^2, beside the
    errors, moves and codes of some rows; where experts may share it, a copy of it, 8 d^2."""
    own = _FLOAT * site.stacked + site.stacked * 17 // 32
    if not job.recipe.rounding.needs_hessian:
        return own
    copies = 2 * _FLOAT + (_DOUBLE if site.experts else 0)
    return own + copies * site.width**2 + site.width**2 // 4 + 12 * min(_CHUNK, site.stacked)


def worst_site(job: Job, need: Callable[[SiteSizes], int]) -> int:
    """What the site takes that takes most."""
    return max((need(site) for site in job.sites), default=0)


def _widest(job: Job) -> int:
    return max((site.width for site in job.sites), default=0)


def _sum(*parts: dict[str, int]) -> dict[str, int]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def _without_zeros(phase: Phase) -> Phase:
    return Phase(
        name=phase.name,
        compute={name: size for name, size in phase.compute.items() if size},
        host={name: size for name, size in phase.host.items() if size},
    )


def _worst(name: str, every: Iterable[Phase], free: int) -> Budget:
    worst = max(every, key=lambda phase: sum(phase.host.values()))
    return Budget(name=name, phase=worst.name, parts=worst.host, free=free)
