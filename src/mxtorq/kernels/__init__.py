"""The same functions as in `formats`, faster: same names, same bits, one folder a backend.

Lives here: which backend does what where (`dispatch`), and the backends: `numba` for CPUs, `triton`
for GPUs. Eager torch is the third; it needs nothing installed, and stands where each function is
defined (`formats`, or beside its algorithm).
Does not live here: what is computed. A kernel takes tensors or arrays and knows no method, no
layer and no file; whoever wants to know what it does reads the eager version.

To add a backend: a member of `dispatch.Backend` with its device, a folder with functions of the
same names, the branch in each function of `dispatch` that it serves, and tests that compare bits.
"""
