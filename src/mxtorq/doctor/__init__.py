"""What is wrong with an MXFP4 checkpoint, ours or not, and which engine runs it as what.

Lives here: a checkpoint of any known layout as one table of linears (`subject`), the checks, each a
function from that table to findings (`checks`), what engines make of it (`engines`), and all of it
in one go (`examination`).
Does not live here: how findings look (`reports`), or how checkpoints are written (`export`).

To add a check: one function in `checks.CHECKS`. To add an engine: one entry in `engines.ENGINES`.
"""
