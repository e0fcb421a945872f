"""Trace files: what a cache kept at every compression; written, read, shown."""
