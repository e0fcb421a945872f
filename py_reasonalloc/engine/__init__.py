"""The native library, and what it says of model files and caches; errors."""
