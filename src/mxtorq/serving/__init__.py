"""mxtorq's checkpoints in other engines: adapters that keep the transforms which stock ones drop.

Lives here: transformers (`transformers`, announced to it by `registration`) and vLLM (`vllm`).
Does not live here: our own loading (`loading`), the files (`export`), or what a quantized linear
computes (`surgery`, `kernels`): engines get the same functions as everyone.
"""
