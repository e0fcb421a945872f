"""`reasonalloc-bench`: speed and memory of a budgeted cache against the stock cache."""
