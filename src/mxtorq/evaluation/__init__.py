"""Numbers about a model: returned, never printed.

Lives here: perplexity and how far predictions are from another model's (`perplexity`), how far
outputs and the residual stream are from the originals (`fidelity`), and accuracy on tasks through
the lm-evaluation-harness (`harness`, and `engine` with vLLM): which tasks and averages (`tasks`),
what they ask (`questions`), documents from a folder (`documents`) and the task files for them.
Does not live here: tables (`reports`) or choosing what to evaluate (`pipeline`).
"""
