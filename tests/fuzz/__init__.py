"""Whatever comes in, no fault of the service comes out: `python -m tests.fuzz`."""
