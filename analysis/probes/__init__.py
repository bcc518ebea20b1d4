"""Probe data and feature sets: read, checked and handed out in batches."""
