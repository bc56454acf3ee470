"""Results to pages; knows no torch.

Lives here: the documented, versioned record of results (`schema`) and its renderings, as tables
for a terminal or Markdown (`render`) and as pages, with what says which differences are real
(`intervals`, `fidelity`) and what a method chose (`choices`). Likewise of a checkpoint
(`contents`), an inspection (`inspection`, `imbalance`), an examination (`findings`, `diagnosis`)
and a forecast (`needs`). A page is data (`blocks`): `pages` makes it from a record, `html` and
`markdown` write it, and `charts` draws on a `sheet` what it shows. To add a page for a further kind
of record, see `pages`.
"""
