"""mxtorq's checkpoints in other engines: adapters that keep the transforms which stock ones drop.

Lives here: transformers (`transformers`, announced to it by `registration`).
Does not live here: our own loading (`loading`), or the files (`export`).
"""
