"""The tests. Imported before anything of ours, so that all of analysis is checked against its annotations.

Shapes and types, as jaxtyping writes them down, hold in every test that calls analysis in its own process.
"""

from jaxtyping import install_import_hook

install_import_hook("analysis", "beartype.beartype")
