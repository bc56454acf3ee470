"""A plugin that makes vLLM (0.32 and later) compute mxtorq's checkpoints in W4A4.

vLLM calls `plugin.register` in each of its processes, by the entry point that our package names in
the group ``vllm.general_plugins``. Nothing else is needed: ``vllm serve FOLDER``.

    plugin      what is registered: the quantization method, the operator, a kernel
    linear      a quantized linear of a checkpoint with transforms, in vLLM's terms
    stock       the kernel for compressed-tensors checkpoints, which have no transforms
    checkpoint  the manifest in vLLM's terms: which site a fused linear belongs to
    shards      a transform of some of the channels, for tensor parallelism
    product     what both compute: transform, round, multiply

Only `linear` and `stock` import vLLM, and only `plugin` imports them, when vLLM calls it.

The numbers are those of `mxtorq.load`: the same kernels, transforms in float32. What vLLM fuses
(q, k and v; gate and up) is what shares a site here, so a fused linear transforms its input once.

To follow a change of vLLM: `make test-vllm` installs an engine, serves checkpoints and compares.
"""
