"""HiRes: the quantizer that QuantForge found (arXiv 2609.34680v1, September 2026), its stage I.

T = P (I + K)^T H D for each block of 32: `geometry` holds the reference coordinates P, the
interaction K and the balance D, `method` the options, the passes through the format, and the fit.

Left out on purpose: stage II changes one activation code a block at run time by a rule that needs
two float32 matrices a block, stage III adds fitted scalars to attention and MLP. Both are
arithmetic outside of an MXFP4 matrix product. Stage II's GPTQ is the recipe's ``rounding``.
"""
