"""Checkpoints to and from files: saving, capturing features, and conversion of what torch has pickled."""
