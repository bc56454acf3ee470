"""DuQuant (arXiv 2406.01721) and DuQuant++ (arXiv 2604.17789): rotations that look for outliers.

`greedy` is the rotation that both search for, `zigzag` the permutation that only DuQuant has, and
`method` the options and the fit of both.
"""
