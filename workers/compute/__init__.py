"""Code of the compute process: torch, the probes and the analyses of each kind."""
