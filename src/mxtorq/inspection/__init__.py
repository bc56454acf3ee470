"""What MXFP4 sees of a model: the imbalances that transforms promise to mend, before and after.

Lives here: the measures of one tensor (`measures`), usable on any activation or weight; those of
all sites of a model under several methods, layer by layer (`survey`); which sites hurt the model
most (`harm`); and all of it in one go (`examination`).
Does not live here: the record (`reports.inspection`) and how it looks (`reports.imbalance`).

To add a measure: a field of `reports.inspection.Picture` that counts or sums something, filled in
`measures.Measure`; a figure made of such fields is a property there.
"""
