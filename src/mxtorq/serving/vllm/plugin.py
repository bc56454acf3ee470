"""What vLLM calls in each of its processes, by the entry point in our package's metadata.

vLLM's insides change from release to release. In one where a name is missing that the plugin needs
it warns and registers nothing: vLLM goes on with other models, and refuses our checkpoints with
transforms as an unknown method.
"""

import warnings


def register() -> None:
    """Make vLLM know our quantization method, operator and kernel. Calling it again does nothing.

    Set ``VLLM_PLUGINS`` to a list without ``mxtorq`` to run vLLM without it.
    """
    try:
        from vllm.model_executor.kernels import linear as kernels
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.platforms import PlatformEnum

        from mxtorq.serving.vllm.linear import MxtorqConfig, register_operator
        from mxtorq.serving.vllm.stock import MxtorqMxFp4LinearKernel, complete_transforms
    except ImportError as error:
        warnings.warn(
            f"mxtorq's plugin does not fit this vLLM and is left out: {error}. It is tested with "
            "vLLM 0.32.",
            RuntimeWarning,
            stacklevel=1,
        )
        return
    from mxtorq.export.compressed_tensors import OWN

    register_quantization_config(OWN)(MxtorqConfig)
    register_operator()
    complete_transforms()
    for platform in (PlatformEnum.CPU, PlatformEnum.CUDA):
        if MxtorqMxFp4LinearKernel not in kernels._POSSIBLE_MXFP4_KERNELS.get(platform, []):
            kernels.register_linear_kernel(MxtorqMxFp4LinearKernel, platform, "mxfp4")
