"""Keep and report: the results file, what its rows must share, what they say."""
