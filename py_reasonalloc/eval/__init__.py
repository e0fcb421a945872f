"""Evaluation: accuracy, length and memory of eviction methods at given budgets.

`datasets` problems and prompts - `answers` what counts as correct - `loops` runaway texts -
`methods` names of arms - `rows` one measured text - `results` the file they are kept in -
`worker`, `run` decoding - `statistics`, `report`, `report_plot` what the rows say - `cli` the
command `reasonalloc-eval`.
"""
