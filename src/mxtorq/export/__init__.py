"""Tensors in, files out, and back.

Lives here: the compressed-tensors description of MXFP4 (`compressed_tensors`), our manifest
(`manifest`), and the folder as a whole, written atomically and read with suspicion (`checkpoint`,
`unfinished`). And the same model in other layouts (`convert`): what any MXFP4 folder is (`packed`),
folders of transformers (`folders`, with `quark` and `fake_quant`), GGUF files (`gguf`).
Does not live here: modules. To add a further format: one file that takes a `packed.Packed`, and a
member of `convert.Format`.
"""
