"""Numbers about a model: returned, never printed.

Lives here: perplexity (`perplexity`) and how far quantized outputs are from the originals
(`fidelity`). Does not live here: tables (`reports`) or choosing what to evaluate (`pipeline`).
"""
