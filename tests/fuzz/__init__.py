"""Fuzz tests: no input may cause a fault of the service. `python -m tests.fuzz` runs them."""
