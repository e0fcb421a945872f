"""How close a budgeted cache stays to the full one on plain text: `reasonalloc-eval fidelity`.

No labels, no benchmark: the same text is read with the full cache and with every budgeted one, and
the distributions of the next token are compared.
"""
