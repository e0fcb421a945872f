"""`reasonalloc-serve`: an OpenAI-compatible server that batches requests into one context."""
