"""Everything that reads strangers' bytes: archives, tensors and datasets."""
