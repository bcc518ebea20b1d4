"""Fetch files from where they lie. The transfer runs in a process of its own, which has the credentials it needs."""
