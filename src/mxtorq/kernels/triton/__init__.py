"""GPU kernels in Triton: tensors in, tensors out, launched on the tensors' own device.

    mxfp4       quantize, fake_quantize, dequantize: the functions of `formats.mxfp4`, same bits
    rotate      one 32 x 32 matrix for all blocks, then rounding, without a copy in between
    two_level   TORQ's pair R_inter (x) R_intra, then rounding, likewise
    chain       the Givens rotations of R_inter in the form that it reads
    gptq        one group of 32 columns of GPTQ, all rows side by side
    matmul      W4A4 products on the matrix units, and for a few tokens at a time
    elements    what they share: float32 bits to scale bytes and codes, and back
    compile     the decorator of every kernel, and the options of every launch

Nothing is imported here, and nothing here is imported before a caller picks Triton. The kernels run
without a GPU in Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported), which is how
their bits are tested, and the tests compile them for five architectures. ``benchmarks/gpu.py``
compares bits and measures on a GPU.
"""
