"""The same functions as in `formats`, faster: same names, same bits, one folder a backend.

Lives here: which backend does what where (`dispatch`), and the backends: `numba` for CPUs, `triton`
for GPUs. Eager torch is the third; it needs nothing installed, and stands where each function is
defined (`formats`, or beside its algorithm).
Does not live here: what is computed. A kernel takes tensors or arrays and knows no method, no
layer and no file; whoever wants to know what it does reads the eager version.

To add a backend: a folder that has the functions of `dispatch.FUNCTIONS` (or some of them), and a
line in `dispatch.BACKENDS`. The tests in ``tests/kernels`` run over that table and compare bits.
"""
