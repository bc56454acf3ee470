"""From a name or a folder to a module that runs.

Lives here: Hugging Face models (`source`) and mxtorq's own checkpoints (`checkpoint`).
Does not live here: the layout of our files (`export`), or what replaces a linear (`surgery`).
"""
