"""Evaluation: accuracy, length and memory of eviction methods at given budgets.

`datasets` problems and prompts - `answers` what counts as correct - `loops` runaway texts -
`methods` names of arms - `rows` one measured text - `results` the file they are kept in - `plan`
what is to be done - `worker`, `run` decoding here - `servers`, `exchange`, `wire`, `http_server`,
`serve` decoding on other machines - `statistics`, `report`, `report_plot`, `report_cli` what the
rows say - `cli` the command `reasonalloc-eval`.
"""
