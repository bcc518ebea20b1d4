"""The same digits on a GPU as on the processor: `make cuda`.

These tests import analysis, torch and the libraries of networks, and nothing of the service: a machine that has only a
GPU image's own packages runs them. Without a GPU they run on the processor, so that none is broken when one is there.
"""
