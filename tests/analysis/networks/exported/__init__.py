"""Networks that are graphs."""
