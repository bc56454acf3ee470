"""Tensors in, files out, and back.

Lives here: the compressed-tensors description of MXFP4 (`compressed_tensors`), our manifest
(`manifest`), the model card (`card`), and the folder as a whole, written atomically and read with
suspicion (`checkpoint`).
Does not live here: modules. To add a further format: one file that takes named tensors.
"""
