"""Readers of untrusted files: archives, tensors and datasets."""
