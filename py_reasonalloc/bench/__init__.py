"""Speed and memory of a budgeted cache against the stock cache: `reasonalloc-bench`."""
