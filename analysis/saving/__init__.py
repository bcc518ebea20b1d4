"""Checkpoints to and from files: saving, capturing features, and conversion of torch pickles."""
