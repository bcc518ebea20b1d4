"""The tests. This is imported before anything of ours, and before torch."""

import importlib.util
import os

from jaxtyping import install_import_hook

# Shapes and types, as jaxtyping writes them down, hold in every test that calls analysis in its own process. Only the
# tests for a GPU run where beartype is not installed.
if importlib.util.find_spec("beartype") is not None:
    install_import_hook("analysis", "beartype.beartype")

# Matrices in tests are small, and threads that wait for each other on a busy machine are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
