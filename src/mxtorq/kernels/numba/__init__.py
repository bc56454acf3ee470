"""CPU kernels compiled by numba: no compiler to install, nothing to build.

Each file is one kind of work on NumPy arrays or CPU tensors. `compile` has the decorator that all
kernels wear, `pool` spreads rows over torch's number of threads.
"""
