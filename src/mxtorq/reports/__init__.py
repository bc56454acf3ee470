"""Results to pages; knows no torch.

Lives here: the documented, versioned record of results (`schema`) and its renderings (`render`).
"""
