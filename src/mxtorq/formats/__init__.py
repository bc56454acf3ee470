"""MX numbers as pure functions on tensors: what a value becomes, bit for bit.

Lives here: the card of the format (`spec`), its elements (`e2m1`), its scales and the rules that
choose them (`e8m0`), whole tensors (`mxfp4`), and the slow exact witness (`reference`).
Does not live here: anything that knows of layers, models or files.

To add a number format: a card in `spec`, one file for its elements, one for tensors of it, and a
Fraction version in `reference` that the tests walk exhaustively.
"""
