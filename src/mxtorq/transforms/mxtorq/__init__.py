"""Our own method: many candidates for every site, and the one that loses least is taken.

`method` has the options and the choice, `candidates` what is compared, `layer_aware` the transform
that is new, and `loss` what they are compared by.
"""
