"""Run by every Python process that the tests start, this folder being on its PYTHONPATH; see operators.py beside it."""

import operators

operators.define_before_torchvision()
