"""One piece of work with a model, from options to result: a text, a dry run, a calibration."""
