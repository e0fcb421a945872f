"""How close a budgeted cache stays to the full one on plain text: `reasonalloc-eval fidelity`.

No labels, no benchmark: the same text is read with the full cache and with every budgeted one, and
the distributions of the next token are compared.

`texts`, `probes` what is read - `plan` with which caches - `stream`, `metrics`, `run` read and
compare - `rows` a line of the results file - `resample`, `report`, `tables`, `plot` say what came
out - `recommend` the smallest cache that is close enough - `smollm2` a small model to try it on.
"""
