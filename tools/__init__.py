"""What writes parts of this repository: `make types`."""
