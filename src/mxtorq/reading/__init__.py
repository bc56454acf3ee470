"""Files that somebody else wrote, read with suspicion.

Lives here: bounded text and strict JSON (`documents`), a model's config.json (`configuration`), the
headers of safetensors files (`headers`), and folders of them (`shards`). Everything is checked
before memory is taken for it, and every refusal is an error of ours.
Does not live here: what the values mean. A reader gets a `documents.Refusal` and does not know
whose file it reads; models are built in `loading`, our own layout stands in `export`.
"""
