"""From text to statistics.

Lives here: reading text and cutting it into token windows (`data`), recording what reaches each
input site of a layer (`capture`), and summing it up (`statistics`).
Does not live here: what the statistics are used for.

To add a named text: one entry in `data.NAMED_TEXTS`.
"""
