"""Checks every shape and type that analysis annotates, in all tests of this folder.

The hook must be in place before `analysis` is imported for the first time.
"""

import sys

from jaxtyping import install_import_hook

assert "analysis" not in sys.modules, "analysis was imported before its annotations could be checked"
install_import_hook("analysis", "beartype.beartype")
