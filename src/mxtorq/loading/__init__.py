"""From a name or a folder to a module that runs.

Lives here: Hugging Face models (`source`; `hub` says why there is none), mxtorq's own checkpoints
(`checkpoint`, written by `writer`), and which family either is of (`families`).
Does not live here: the layout of our files (`export`), or what replaces a linear (`surgery`).
"""
