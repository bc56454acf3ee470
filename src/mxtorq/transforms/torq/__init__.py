"""TORQ: Two-Level Orthogonal Rotation for MXFP4 Quantization (arXiv 2605.19561, May 2026).

`inter_block` equalises the variance of blocks (Algorithm 1), `intra_block` evens out the use of
the E2M1 codebook inside blocks (Algorithm 2), `rotation` is the pair of them as one transform
(Algorithm 3), `method` the options and the fit.
"""
