"""Layer profiles: the file, the one that fits a model, its picture."""
