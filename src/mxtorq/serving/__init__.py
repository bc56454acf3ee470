"""What makes other programs run our checkpoints.

Lives here: one folder a program, `vllm`.
Does not live here: the layout of a checkpoint (`export`), or what a quantized linear computes
(`surgery`, `kernels`): engines get the same functions as everyone.
"""
