"""The only code that edits an nn.Module.

Lives here: the layers that replace a linear (`linear`), putting them in place (`fuse`), exact
channel rescalings (`rescale`) with the outlier profiles that use them (`outliers`), rotations that
are merged into weights (`offline`, `norms`), and the loss that learns them (`network`).
Does not live here: choosing transforms or codes; reading or writing files.
A function that changes its argument ends in an underscore.
"""
