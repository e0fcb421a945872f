"""The console scripts, one module each: parsing and printing, nothing else."""
