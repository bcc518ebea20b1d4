"""Passes of a network over a probe: batches, precision, extracted features and positions."""
