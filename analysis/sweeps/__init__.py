"""Several networks in a row: interpolation paths, pruning sweeps and series of checkpoints."""
