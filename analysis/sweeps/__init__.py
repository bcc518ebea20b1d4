"""Sequences of networks: interpolation paths, pruning sweeps and series of checkpoints."""
