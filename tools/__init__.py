"""Generators of files of this repository: `make types`."""
