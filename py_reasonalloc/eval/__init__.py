"""Evaluation: accuracy, length and memory of eviction methods at given budgets.

`cases` what is asked - `results` keep and report - `decode` decode and judge here - `remote` decode
on other machines. Each knows only those before it.
"""
