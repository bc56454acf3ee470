"""Tensors in, files out, and back.

Lives here: the compressed-tensors description of MXFP4 (`compressed_tensors`), our manifest
(`manifest`), the model card (`card`), the folder as a whole, read with suspicion (`checkpoint`),
and how it comes to be (`unfinished`). And the same model in other layouts (`convert`): what any
MXFP4 folder is (`packed`), folders of transformers (`layouts`, with `quark` and `fake_quant`), and
GGUF files (`gguf`).
Does not live here: modules. To add a further format: one file that takes a `packed.Packed`, and a
member of `convert.Format`.
"""
