"""The HTTP service, and what the workers share with it. Imports no torch."""
