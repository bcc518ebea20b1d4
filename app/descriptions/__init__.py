"""Descriptions of checkpoints: architecture, labels and preprocessing."""
